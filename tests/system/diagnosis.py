"""`diagnose`: the same numbers on any number of ranks, plausible ones; KL of one linear as `evaluate` sees a checkpoint with only
that one quantized; what it refuses. `compare` of two runs' statistics."""
import json
import os
import re
import subprocess

from isobath_system import BLOCKS, ENVIRONMENT, LENGTH, Workspace, binary, run_well, write_tokens

MODULES = 7 * BLOCKS
# Two f32 forward passes of other shapes; sums of a few hundred terms.
RELATIVE = 1e-3


def call(command, *options, ranks=1):
    line = [os.environ.get("ISOBATH_MPIEXEC", "mpirun"), "--quiet", "-n", str(ranks), binary(), command, *map(str, options)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def well(command, *options, ranks=1):
    job = call(command, *options, ranks=ranks)
    assert job.returncode == 0, job.stderr
    return job.stdout


def same_numbers_for_any_ranks(space, config):
    texts = []
    for ranks in (1, 2, 3):
        output = space.path / f"diagnosis-{ranks}.json"
        table = well("diagnose", config, "--sequences", 3, "--json", output, ranks=ranks)
        assert "at risk:" in table and "rank correlation with KL" in table, table
        texts.append(output.read_text())
    assert texts[0] == texts[1] == texts[2]
    return json.loads(texts[0])


def numbers_make_sense(found):
    assert len(found["modules"]) == MODULES and len(found["blocks"]) == BLOCKS
    assert found["tokens"] == 3 * (LENGTH - 1)
    for part in found["modules"] + found["blocks"]:
        assert part["kl"] > 0 and part["predicted_second_order"] > 0 and part["predicted_objective"] > 0, part
        assert part["curvature_ratio"] > 0, part
    for part in found["modules"]:
        assert part["effective_samples_per_channel"] > 0 and part["cross_token_mass"] is not None, part
    assert len(found["at_risk"]) == 10 and all(named["reasons"] for named in found["at_risk"])
    # Second order orders the linears of so small a model, whichever label draws it had.
    assert found["agreement"]["rank_correlation_second_order"] > 0.5, found["agreement"]


def one_linear_replaced_by_hand(space, config, found):
    """KL and loss of one linear alone, as `evaluate` sees a checkpoint in which only that one is quantized."""
    module = "model.layers.2.mlp.down_proj"
    alone = f"quantization.ignore=[lm_head, 're:(?!{re.escape(module)}$).*']"
    run_well(space.config("alone"), stages=1, settings=(
        alone, "compute_dtype=float32", "quantization.solver=round_to_nearest", f"evaluation.tokens={space.calibration}",
        "evaluation.windows=3"))
    evaluated = json.loads((space.path / "alone" / "evaluation.json").read_text())
    output = space.path / "alone.json"
    well("diagnose", config, "--sequences", 3, "--json", output, "--checkpoint", space.path / "alone" / "model", "--set", alone)
    part = json.loads(output.read_text())["modules"]
    assert [p["name"] for p in part] == [module]
    assert abs(part[0]["kl"] / evaluated["kl_mean"] - 1) < RELATIVE, (part, evaluated)


def fewer_parts(space, config):
    output = space.path / "some.json"
    well("diagnose", config, "--sequences", 2, "--modules", 5, "--json", output, ranks=2)
    assert sum(part["kl"] is not None for part in json.loads(output.read_text())["modules"]) == 5
    well("diagnose", config, "--sequences", 2, "--blocks", "--json", output)
    found = json.loads(output.read_text())
    assert all(part["kl"] is None for part in found["modules"]) and all(part["kl"] for part in found["blocks"])


def comparison(space):
    other = write_tokens(space.path / "other.safetensors", seed=11)
    run_well(space.config("other"), stages=2, settings=(f"calibration.tokens={other}", "evaluation.tokens=''"))
    table = well("compare", space.path / "first", space.path / "other", "--top", 3)
    assert f"The 3 least alike of {MODULES} linears" in table and "these have not" in table, table
    same = json.loads(well("compare", space.path / "first", space.path / "first/measure", "--json"))
    assert same["same_tokens"] and all(abs(part["cosine_d"] - 1) < 1e-9 for part in same["modules"])
    job = call("compare", space.path / "first", space.path / "nowhere")
    assert job.returncode == 3 and "nowhere" in job.stderr, job.stderr


def refused(space, config):
    unfinished = space.config("unfinished")
    job = call("diagnose", unfinished, ranks=2)
    assert job.returncode == 2 and "isobath quantize" in job.stderr, job.stderr
    job = call("diagnose", config, "--sequences", 1000)
    assert job.returncode == 3 and "1000" in job.stderr, job.stderr


with Workspace("float32") as workspace:
    first = workspace.config("first")
    run_well(first, stages=2)
    diagnosis = same_numbers_for_any_ranks(workspace, first)
    numbers_make_sense(diagnosis)
    one_linear_replaced_by_hand(workspace, first, diagnosis)
    fewer_parts(workspace, first)
    comparison(workspace)
    refused(workspace, first)
