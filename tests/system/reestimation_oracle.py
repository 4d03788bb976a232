"""What `quantization.reestimate` measures behind quantized blocks, against f64 autograd through the model whose first blocks have
the decoded weights of the run's checkpoint; the losses of reestimations.json and blocks.json too. On one rank and on two stages."""
import json
import pathlib
import sys

import h5py
import numpy
import torch
from isobath_system import LENGTH, SEQUENCES, Workspace, run_well, write_tokens

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools/python"))
import compare_statistics  # noqa: E402

# Of the largest entry of each array, and of each entry of D: f32 against f64, six times what is seen on CPUs. KL sets them: its
# gradient p - p~ loses the digits that both have in common.
TOLERANCE, TOKEN_TOLERANCE = 3e-5, 2e-4
# Without the prefix, or with one block less of it, D is another by far more than that, or the comparison would not tell.
LEAST_EFFECT = 0.05
# A padded sequence in each half: padding must count nowhere.
PADDED = [LENGTH - 5] + [LENGTH] * (SEQUENCES - 2) + [LENGTH - 9]
COMPARED = ("sensitivity.per_sequence=exact", "sensitivity.covariance=true", "compute_dtype=float32", "evaluation.tokens=''")
GROUPED = ("sensitivity.row_groups=2", "sensitivity.grouping=cluster", "sensitivity.grouping_sequences=3")

TRACKED = ("quantization.reestimate.track=true", f"quantization.reestimate.probe_sequences={SEQUENCES}")

# name -> model, blocks before which D is measured again, settings
CASES = {
    "nll": ("tiny_llama_a", (1, 2), ("quantization.reestimate.loss=nll", "quantization.bits=2", "quantization.symmetric=false")),
    "kl": ("tiny_llama_a", (1, 2), ("quantization.reestimate.loss=kl", "quantization.bits=2") + TRACKED),
    "kl, clustered rows": ("tiny_llama_b", (1,), ("quantization.reestimate.loss=kl", "calibration.microbatch=2") + GROUPED),
    "fisher": ("tiny_llama_a", (2,), ("sensitivity.loss=fisher", "sensitivity.samples=2", "calibration.seed=7")),
}


def smallest_effect(directory, reference):
    """Of the largest entry, how far D of a module is from that of the reference; of the least changed module."""
    effects = []
    for path in sorted(directory.glob("block-*.h5")):
        with h5py.File(path) as now, h5py.File(reference / path.name) as then:
            for module in now:
                d, other = now[module]["token_weights"][:], then[module]["token_weights"][:]
                effects.append(numpy.abs(d - other).max() / d.max())
    return min(effects)


def losses_behind_each_block(run, model_directory, tokens_file):
    """nll and KL per token of the model whose first 1, 2 … blocks are those of the run's checkpoint."""
    tokens, lengths = compare_statistics.read_tokens(tokens_file, SEQUENCES, LENGTH)
    model = compare_statistics.load_model(model_directory)
    quantized = list(compare_statistics.decoded_weights(run / "model"))
    losses = []
    for block in range(len(model.model.layers)):
        for module, weight in quantized:
            if f".layers.{block}." in module:
                model.get_submodule(module).weight.data.copy_(weight)
        loss = compare_statistics.Loss({"loss": "kl"}, model_directory)
        with torch.no_grad():
            for sequence, n_real in enumerate(lengths.tolist()):
                row = tokens[sequence, :n_real]
                loss.of(model(row[None]).logits[0, :-1], row, sequence, 0)
        losses.append(loss.per_token())
    return losses


def compare_blocks(run, model_directory, tokens_file):
    records = json.loads((run / "blocks.json").read_text())
    expected = losses_behind_each_block(run, model_directory, tokens_file)
    assert [record["block"] for record in records] == list(range(len(expected))), records
    for record, losses in zip(records, expected):
        for key, reference in losses.items():
            error = abs(record[key] / reference - 1)
            print(f"blocks.json, block {record['block']}: {key} {record[key]:.6g}, error {error:.1e}", flush=True)
            assert error <= compare_statistics.LOSS_TOLERANCES[key], (record, losses)


def philox_is_that_of_the_paper():
    """Known answers of Random123, kat_vectors."""
    for counter, key, expected in (
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert compare_statistics.philox4x32(counter, key) == expected, counter


philox_is_that_of_the_paper()
with Workspace("bfloat16") as space:
    write_tokens(space.calibration, lengths=PADDED)
    for number, (case, (model, blocks, settings)) in enumerate(CASES.items()):
        for stages in (1, 2):
            name = f"run-{number}-{stages}"
            policy = f"quantization.reestimate={{policy: every, blocks: {blocks[0]}}}"
            config = space.config(name, model=f"{ROOT}/tests/data/{model}")
            job = run_well(config, stages=stages, settings=(policy, *COMPARED, *settings))
            before = sorted((space.path / name / "measure").glob("before-block-*"))
            assert [path.name for path in before] == [f"before-block-{b:05d}" for b in blocks], before
            previous = space.path / name / "measure"
            for directory in before:
                print(f"{case}, {stages} stages, {directory.name}: run {job.seconds:.1f} s", flush=True)
                words = (ROOT / "tests/data" / model, space.calibration, directory, "--sequences", SEQUENCES, "--length", LENGTH,
                         "--tolerance", TOLERANCE, "--token-tolerance", TOKEN_TOLERANCE)
                assert compare_statistics.main([str(word) for word in words]) == 0, f"{case}, {stages} stages, {directory.name}"
                effect = smallest_effect(directory, previous)
                assert effect > LEAST_EFFECT, f"{case}: D of a module changed by {effect:.2e} only since {previous}"
                print(f"D changed by {effect:.2f} at least", flush=True)
                previous = directory
            if settings[-len(TRACKED):] == TRACKED:
                compare_blocks(space.path / name, ROOT / "tests/data" / model, space.calibration)
