"""Every layout of ranks writes the same bytes, with weights that stay in memory and with streamed ones."""
import json
import shutil

import isobath_system
from isobath_system import (BLOCKS, CLUSTERED, DRIFTING, EVERYTHING_ON, OTHERWISE, PLAIN, TUNED, Workspace, assert_same_bytes,
                            reestimations, result_digests, run_well)

LAYOUTS = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (4, 1)]
# The covariance of this width's down_proj is spread over the ranks in panels (quant::kWholeColumns), and needs all of
# its six panels of 384 columns.
WIDE_D_FF = 2304
# Each with block inputs in memory or, all of them, on disk.
STREAMED_LAYOUTS = [(1, 1), (2, 1), (1, 3), (2, 2)]
VARIANTS = {
    "bfloat16": ("bfloat16", isobath_system.D_FF, (), LAYOUTS),
    "float32, everything on, widths scored":
        ("float32", isobath_system.D_FF, EVERYTHING_ON + ("sensitivity.gram.bits=[2, 4]",), LAYOUTS),
    "float32, drift": ("float32", isobath_system.D_FF, DRIFTING, LAYOUTS),
    "bfloat16, otherwise": ("bfloat16", isobath_system.D_FF, OTHERWISE, LAYOUTS),
    "float32, clustered": ("float32", isobath_system.D_FF, CLUSTERED, [(1, 1), (2, 1), (1, 2)]),
    "float32, wide, plain": ("float32", WIDE_D_FF, PLAIN, [(1, 1), (2, 1), (3, 1), (2, 2)]),
    "float32, wide": ("float32", WIDE_D_FF, ("quantization.refinement.sweeps=1", "quantization.asymmetric={correction: qep}"),
                      [(1, 1), (2, 1), (3, 1), (2, 2)]),
    "float32, tuned": ("float32", isobath_system.D_FF, TUNED, LAYOUTS),
    "bfloat16, wide, residual stream corrected": ("bfloat16", WIDE_D_FF, ("quantization.asymmetric.residual=0.5",),
                                                  [(1, 1), (2, 1), (3, 1), (2, 2)]),
    "float32, everything on, two threads a rank":
        ("float32", isobath_system.D_FF, EVERYTHING_ON + ("ranks.threads=2",), [(1, 1), (2, 1), (1, 2)]),
}

for variant, (dtype, d_ff, settings, layouts) in VARIANTS.items():
    isobath_system.D_FF = d_ff
    with Workspace(dtype) as space:
        expected = None
        scratch = ("residency=streamed", f"scratch.directory={space.path / 'scratch'}")
        streamed = [(layout, scratch + (f"scratch.memory_gib={i % 2}",)) for i, layout in enumerate(STREAMED_LAYOUTS)
                    if settings is not TUNED]
        for (stages, replicas), residency in [(layout, ()) for layout in layouts] + streamed:
            name = f"run-{stages}x{replicas}"
            job = run_well(space.config(name), stages=stages, replicas=replicas, settings=settings + residency)
            digests = result_digests(space.path / name)
            decisions = reestimations(space.path / name)
            if expected is None:
                expected, expected_decisions = digests, decisions
                print(f"{variant}: {decisions}", flush=True)
                if settings is DRIFTING:
                    assert {record["refreshed"] for record in decisions} == {True, False}, decisions
                    assert "D measured again before" in job.stdout, job.stdout
                if settings in (DRIFTING, OTHERWISE):
                    blocks = json.loads((space.path / name / "blocks.json").read_text())
                    assert [record["block"] for record in blocks] == list(range(BLOCKS)), blocks
                    assert all(record["kl_per_token"] > 0 for record in blocks), blocks
                if settings is OTHERWISE:
                    modules = json.loads((space.path / name / "modules.json").read_text())
                    assert all(1 < module["sweeps"] < 1000 for module in modules), modules
                if settings is TUNED:
                    assert "scales tuned in 6 steps" in job.stdout, job.stdout
            else:
                assert_same_bytes(expected, digests, f"{variant}, {stages} stages x {replicas} replicas, {residency}")
                assert decisions == expected_decisions, f"{decisions}, not {expected_decisions}"
            shutil.rmtree(space.path / name)
            print(f"{variant}: {stages} x {replicas} {' '.join(residency[:1])}: {len(digests)} files equal, {job.seconds:.1f} s",
                  flush=True)
        assert not streamed or not list((space.path / "scratch").iterdir()), "a scratch file kept its name"
