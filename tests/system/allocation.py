"""Widths are allocated from scores, quantize takes them on another layout of ranks, and every mismatch is told."""
import json
import os
import pathlib
import re
import subprocess

import h5py
import numpy
from isobath_system import (BLOCKS, ENVIRONMENT, Workspace, assert_same_bytes, binary, digests_of,
                            model_weights, run_well, write_model, write_tokens)

FUSED_SETS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
METHODS = ("quadratic", "diagonal", "weighted", "hawq-v2", "output")
KNAPSACK_GAP = 1e-5  # relative; the solver stops at 1e-6, JSON and sums round below that
# Group 32 in bf16: 0.5 bits a weight for scales.
BUDGET = 3.4
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "mixed.sh"


def call(command, config, *options, ranks=1):
    line = [os.environ.get("ISOBATH_MPIEXEC", "mpirun"), "--quiet", "-n", str(ranks), binary(), command, str(config), *options]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def well(command, config, *options, ranks=1):
    job = call(command, config, *options, ranks=ranks)
    assert job.returncode == 0, job.stderr
    return job.stdout


def refused(config, mentions, *options, command="allocate"):
    job = call(command, config, *options)
    errors = re.findall(r"\berror: .*", job.stderr)
    assert job.returncode == 2 and len(errors) == 1, f"code {job.returncode}: {job.stderr}"
    for mention in mentions:
        assert re.search(mention, job.stderr), f"no mention of {mention}: {job.stderr}"
    print(f"refused: {errors[0]}", flush=True)


def model_digests(output):
    return digests_of(output, [*(output / "model").iterdir(), output / "modules.json", output / "evaluation.json"])


def widths_of(path):
    return {match: int(bits) for match, bits in re.findall(r"match: (\S+), bits: (\d)", path.read_text())}


def choose(space, config, method):
    """One method's widths, after a check of budget and fused sets; the report beside them."""
    output = space.path / "widths" / f"{method}.yaml"
    table = well("allocate", config, "--budget", str(BUDGET), "--method", method, "--output", str(output), ranks=2)
    assert f"{method} (chosen)" in table, table
    widths = widths_of(output)
    assert len(widths) == 7 * BLOCKS
    for block in range(BLOCKS):
        for fused in FUSED_SETS:
            assert len({widths[f"model.layers.{block}.{name}"] for name in fused}) == 1, widths
    for ranks in (1, 4):
        again = space.path / "widths" / f"{method}-{ranks}.yaml"
        well("allocate", config, "--budget", str(BUDGET), "--method", method, "--output", str(again), ranks=ranks)
        for one, other in ((output, again), (output.with_suffix(".json"), again.with_suffix(".json"))):
            assert one.read_bytes() == other.read_bytes(), f"{one} of 2 ranks is not {other} of {ranks}"
    return widths, json.loads(output.with_suffix(".json").read_text())


def score_of(report, method, score):
    """What an additive score sums to for the widths that a method chose."""
    return sum(candidate[score] for chosen in report["sets"] for candidate in chosen["candidates"]
               if candidate["bits"] == chosen["bits"][method])


def allocation_and_quantization(space, config):
    reports = {}
    for method in ("diagonal", "hawq-v2", "quadratic"):
        widths, report = choose(space, config, method)
        reports[method] = report
        found = {entry["method"]: entry for entry in report["methods"]}
        assert tuple(found) == METHODS
        assert all(entry["mean_bits"] <= BUDGET for entry in found.values())
        assert min(entry["predicted_loss_increase"] for entry in found.values()) == found["quadratic"]["predicted_loss_increase"]
        for score in METHODS[1:]:
            least = score_of(report, score, score)
            assert all(score_of(report, other, score) >= least - KNAPSACK_GAP * abs(least) for other in METHODS), score
        assert report["share_of_weighted"] and all(0 <= share <= 1 for share in report["share_of_weighted"].values())
        assert report["lower_bound"] <= found["quadratic"]["predicted_loss_increase"] + 1e-9
        for chosen in report["sets"]:
            for module in chosen["modules"]:
                assert widths[module] == chosen["bits"][method]
    assert all(report["methods"] == reports["diagonal"]["methods"] for report in reports.values())

    output = space.path / "second-order.yaml"
    well("allocate", config, "--budget", str(BUDGET), "--no-first-order", "--output", str(output))
    second_order = json.loads(output.with_suffix(".json").read_text())
    assert not second_order["first_order_term"] and reports["quadratic"]["first_order_term"]
    # A sum of squares: without a first-order term nothing is gained by rounding.
    assert all(candidate["diagonal"] > 0 for chosen in second_order["sets"] for candidate in chosen["candidates"])

    in_bytes = space.path / "bytes.yaml"
    well("allocate", config, "--budget-bytes", str(reports["quadratic"]["budget_bits"] // 8), "--output", str(in_bytes))
    widths = widths_of(in_bytes)
    assert len(set(widths.values())) > 1, widths
    settings = (f"quantization.allocation={in_bytes}", f"sensitivity.reuse={space.path}/scored/measure")
    job = run_well(space.config("mixed"), stages=1, replicas=2, settings=settings)
    expected = model_digests(space.path / "mixed")
    for stages, replicas in ((1, 1), (2, 2)):
        run_well(space.config(f"mixed-{stages}"), stages=stages, replicas=replicas, settings=settings)
        assert_same_bytes(expected, model_digests(space.path / f"mixed-{stages}"), f"{stages} stages x {replicas} replicas")
    mean_bits = reports["quadratic"]["methods"][0]["mean_bits"]
    assert re.search(rf"bits per weight, scales included +16 +{mean_bits:.3f}", job.stdout), job.stdout
    scheme = json.loads((space.path / "mixed/model/config.json").read_text())["quantization_config"]
    written = {target: group["weights"]["num_bits"] for group in scheme["config_groups"].values() for target in group["targets"]}
    assert written == widths
    records = {record["module"]: record["bits"] for record in json.loads((space.path / "mixed/modules.json").read_text())}
    assert records == widths
    return in_bytes


def pinned(space, config):
    """An override's width is kept, and the rest of the budget goes to the others."""
    output = space.path / "pinned.yaml"
    pin = "quantization.overrides=[{match: 're:.*down_proj$', bits: 4}]"
    well("allocate", config, "--budget", str(BUDGET), "--set", pin, "--output", str(output))
    assert all(bits == 4 for module, bits in widths_of(output).items() if module.endswith("down_proj"))


def h5py_text(value):
    return value.decode() if isinstance(value, bytes) else value


def of_checkpoints(space, config):
    """Weights that checkpoints rounded to nearest have score as rounding them does, on any layout."""
    for bits in (2, 3, 4):
        well("quantize", space.config(f"rounded-{bits}", quantization={"solver": "round_to_nearest", "bits": bits}))
    paths = [f"{space.path}/rounded-{bits}/model" for bits in (2, 3, 4)]
    gram = {"bits": [2, 3, 4], "checkpoints": paths}
    solved = space.config("solved", sensitivity={"gram": gram, "loss": "nll"})
    well("measure", solved, "--set", "ranks.stages=2", ranks=2)
    for block in range(BLOCKS):
        with h5py.File(space.path / f"solved/measure/block-{block:05}.h5") as file, \
                h5py.File(space.path / f"scored/measure/block-{block:05}.h5") as rounded:
            for module in rounded:
                found, expected = file[module]["perturbations"], rounded[module]["perturbations"]
                assert h5py_text(found.attrs["rounding"]) == "as in quantized checkpoints"
                for name in ("first_order", "weighted_change", "weight_change"):
                    assert numpy.array_equal(found[name][...], expected[name][...]), (module, name)
    chosen = well("allocate", solved, "--budget", str(BUDGET), "--output", str(space.path / "solved.yaml"))
    assert "quadratic (chosen)" in chosen

    # Refused before there is a run directory: the same output each time.
    def refused_to_measure(mentions, **keys):
        job = call("measure", space.config("unsolved", sensitivity={"gram": {**gram, **keys}, "loss": "nll"}))
        assert job.returncode in (2, 3) and all(re.search(mention, job.stderr) for mention in mentions), job.stderr

    refused_to_measure(["one a width", "found 2 of 3"], checkpoints=paths[:2])
    refused_to_measure(["expected 2 bits, group 32, symmetric", "found 3 bits"], checkpoints=[paths[1], paths[1], paths[2]])
    refused_to_measure(["no quantized weight"], checkpoints=[str(space.model), paths[1], paths[2]])
    other = write_model(space.path / "other-model", weights=model_weights(7))
    well("quantize", space.config("of-other", model=str(other), quantization={"solver": "round_to_nearest", "bits": 2}))
    refused_to_measure(["of-other/model was made from another model"], checkpoints=[f"{space.path}/of-other/model", *paths[1:]])
    refused_to_measure(["absent"], checkpoints=["absent", paths[1], paths[2]])


def by_script(space):
    """launch/mixed.sh does all of it, and only what is left when it is called again."""
    config = space.config("by-script", sensitivity={"gram": {"bits": [2, 4]}, "loss": "fisher", "samples": 2})
    output = space.path / "by-script"

    def call_script(*arguments):
        environment = ENVIRONMENT | {"ISOBATH_PROGRAM": binary(), "SCORE_LENGTH": "16",
                                     "LAUNCHER": f"{os.environ.get('ISOBATH_MPIEXEC', 'mpirun')} --quiet -n 2"}
        return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=300)

    times = []
    for _ in range(2):
        job = call_script(str(config), str(BUDGET))
        assert job.returncode == 0, job.stdout + job.stderr
        made = output / f"mixed-{BUDGET}"
        times.append((made / "model/config.json").stat().st_mtime_ns)
        assert {record["bits"] for record in json.loads((made / "modules.json").read_text())} == {2, 4}
    assert times[0] == times[1]
    # Another budget takes the scores as they are.
    job = call_script(str(config), "3.0")
    assert job.returncode == 0 and (output / "mixed-3.0/model/config.json").exists(), job.stdout + job.stderr
    assert (made / "model/config.json").stat().st_mtime_ns == times[0]
    assert call_script(str(config)).returncode == 2
    job = call_script(str(config), str(BUDGET), "--set", "sensitivity.gram.bits=[3]")
    assert job.returncode == 2 and "two widths" in job.stderr, job.stderr


def mismatches(space, config, widths):
    budget = ("--budget", str(BUDGET))
    refused(config, ["--budget", "2.5000", "4.5000"], "--budget", "2.4")
    refused(config, ["--budget", "2.5000", "4.5000"], "--budget", "4.6")
    refused(config, ["--budget-bytes"], "--budget-bytes", "1000")
    refused(config, ["budget"])
    refused(config, ["split block 0, q/k/v", "3, 4"], *budget, "--set",
            "quantization.overrides=[{match: 're:.*q_proj', bits: 3}, {match: 're:.*k_proj', bits: 4}]")
    refused(config, ["8 bits", "block 0, o", "2, 3, 4"], *budget, "--set",
            "quantization.overrides=[{match: 're:.*o_proj', bits: 8}]")
    refused(config, ["group 32", "group 16", "isobath measure"], *budget, "--set", "quantization.group=16")
    refused(config, ["loss", "fisher", "nll"], *budget, "--set", "sensitivity.loss=fisher")
    other = write_tokens(space.path / "other.safetensors", seed=9)
    refused(config, ["measured differently", "tokens"], *budget, "--set", f"calibration.tokens={other}")
    refused(space.config("nowhere"), ["isobath measure", "nowhere/measure"], *budget)
    plain = space.config("plain")
    well("measure", plain)
    refused(plain, ["holds no scores", "sensitivity.gram.bits"], *budget)

    mixed = space.config("refused")
    use = ("--set", f"quantization.allocation={widths}")
    refused(mixed, ["block 0, q/k/v", "expected one choice"], *use, "--set",
            "quantization.overrides=[{match: 're:.*layers\\.0\\..*q_proj', bits: 8}]", command="run")
    refused(mixed, ["down_proj", "no linear"], *use, "--set", "quantization.ignore=[lm_head, 're:.*down_proj']", command="run")
    text = widths.read_text()
    for name, change, mentions in (
            ("of-another-model", lambda t: re.sub(r"  model: .*", "  model: 0123", t), ["another model", "0123"]),
            ("without-bits", lambda t: t.replace(", bits: ", ", group: 3", 1), ["without bits"]),
            ("a-pattern", lambda t: t.replace("match: model", "match: re:model", 1), ["whole module name"]),
            ("not-yaml", lambda t: t + "}", ["not valid YAML"]),
            ("another-file", lambda t: "model: x\n", ["allocation and overrides"])):
        (space.path / f"{name}.yaml").write_text(change(text))
        refused(mixed, mentions, "--set", f"quantization.allocation={space.path}/{name}.yaml", command="run")
    refused(mixed, ["absent.yaml", "nothing"], "--set", "quantization.allocation=absent.yaml", command="run")


with Workspace() as workspace:
    scored = workspace.config("scored", sensitivity={"gram": {"bits": [2, 3, 4]}, "loss": "nll"})
    well("measure", scored, ranks=2)
    chosen_widths = allocation_and_quantization(workspace, scored)
    pinned(workspace, scored)
    of_checkpoints(workspace, scored)
    by_script(workspace)
    mismatches(workspace, scored, chosen_widths)
