"""Every layout of ranks writes the same bytes."""
import shutil

from isobath_system import EVERYTHING_ON, Workspace, assert_same_bytes, result_digests, run_well

LAYOUTS = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (4, 1)]
VARIANTS = {
    "bfloat16": ("bfloat16", ()),
    "float32, everything on, widths scored": ("float32", EVERYTHING_ON + ("sensitivity.gram.bits=[2, 4]",)),
}

for variant, (dtype, settings) in VARIANTS.items():
    with Workspace(dtype) as space:
        expected = None
        for stages, replicas in LAYOUTS:
            name = f"run-{stages}x{replicas}"
            job = run_well(space.config(name), stages=stages, replicas=replicas, settings=settings)
            digests = result_digests(space.path / name)
            if expected is None:
                expected = digests
            else:
                assert_same_bytes(expected, digests, f"{variant}, {stages} stages x {replicas} replicas")
            shutil.rmtree(space.path / name)
            print(f"{variant}: {stages} x {replicas}: {len(digests)} files equal, {job.seconds:.1f} s", flush=True)
