"""Every kind of bad input, configuration or disk ends with its exit code, one message that names the culprit, and no result."""
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import h5py
import numpy

from isobath_system import (BLOCKS, ENVIRONMENT, HIDDEN, LENGTH, SEQUENCES, VOCAB, Job, Workspace, command, model_weights, run,
                            run_well, write_model, write_tokens)

RANKS = 2
failures = []


def expect(space, name, code, mentions, config=None, **arguments):
    """Runs and expects the exit code and one message with all of `mentions` (regular expressions)."""
    config = config or space.config(name)
    arguments.setdefault("stages", RANKS)
    output = space.path / name
    job = run(config, **arguments)
    problems = []
    if job.code != code:
        problems.append(f"exit code {job.code}, not {code}")
    if len(job.errors()) != 1:
        problems.append(f"{len(job.errors())} error messages, not one")
    for mention in mentions:
        if not re.search(mention, job.stderr, re.IGNORECASE):
            problems.append(f"no mention of {mention}")
    if (output / "model").exists() or (output / "evaluation.json").exists():
        problems.append("something that looks finished was left")
    print(f"{name}: code {job.code}, {job.seconds:.1f} s: {' '.join(job.errors())[:300]}", flush=True)
    if problems:
        failures.append(f"{name}: {'; '.join(problems)}\n{job.stderr}")


def model_with(space, name, changes=None, edit=None):
    """A copy of the model: other keys in config.json, or weights after edit(weights)."""
    weights = model_weights(1)
    if edit:
        edit(weights)
    return str(write_model(space.path / f"model-{name}", weights=weights, changes=changes))


def configurations(space):
    expect(space, "unknown-key", 2, ["quantization.bitz", "quantization.bits"], settings=("quantization.bitz=3",))
    expect(space, "group-does-not-divide", 2, ["48", "group"], settings=("quantization.group=48",))
    expect(space, "more-stages-than-blocks", 2, [str(BLOCKS + 1), str(BLOCKS)], stages=BLOCKS + 1)
    expect(space, "ranks-do-not-fit", 2, ["ranks?"], stages=2, replicas=2, ranks=3)
    expect(space, "divergence-of-the-original", 2, ["sensitivity.loss", "fisher", "reestimate.loss"],
           settings=("sensitivity.loss=kl",))
    expect(space, "tuning-of-streamed-weights", 2, ["quantization.tuning", "residency: resident", "epochs=0"],
           settings=("quantization.tuning={epochs: 1}", "residency=streamed"))
    expect(space, "tracking-without-states", 2, ["quantization.reestimate.track", "quantization.solver: gptq", "round_to_nearest"],
           settings=("quantization.reestimate.track=true", "quantization.solver=round_to_nearest"))
    expect(space, "pattern-of-nothing", 2, ["quantization.ignore", "down_proj", "matches no linear"],
           settings=("quantization.ignore=[down_proj]",))
    expect(space, "split-set", 2, ["block 0, q/k/v", "3 bits", "8 bits", "quantization.overrides"],
           settings=('quantization.overrides=[{match: "re:.*q_proj", bits: 8}]',))
    expect(space, "more-groups-than-heads", 2, ["row_groups = 3", "2 heads of k_proj"],
           settings=("sensitivity.row_groups=3", "sensitivity.grouping=head"))
    expect(space, "more-clusters-than-rows", 2, ["row_groups = 33", "32 output channels of k_proj"],
           settings=("sensitivity.row_groups=33", "sensitivity.grouping=cluster"))


def other_statistics(space):
    """Statistics of another run that do not belong to this one."""
    run_well(space.config("measured"), stages=RANKS)
    reuse = f"sensitivity.reuse={space.path / 'measured' / 'measure'}"
    expect(space, "of-another-model", 2, ["measured differently", "model"],
           space.config("of-another-model", model=str(write_model(space.path / "another", weights=model_weights(7)))),
           settings=(reuse,))
    tokens = write_tokens(space.path / "other-tokens.safetensors", seed=8)
    expect(space, "of-other-tokens", 2, ["measured differently", "tokens"], settings=(reuse, f"calibration.tokens={tokens}"))
    expect(space, "of-another-loss", 2, ["measured differently", "loss: this run has fisher, the statistics have nll", "`isobath measure` with this"],
           settings=(reuse, "sensitivity.loss=fisher"))
    expect(space, "of-other-groups", 2, ["row_groups: this run has 2 by head, the statistics have 1"],
           settings=(reuse, "sensitivity.row_groups=2", "sensitivity.grouping=head"))
    expect(space, "without-clusters", 2,
           ["row_groups: this run has 2 by cluster, of 8 sequences, the statistics have 1"],
           settings=(reuse, "sensitivity.row_groups=2", "sensitivity.grouping=cluster"))
    mixed = space.path / "mixed-statistics"
    shutil.copytree(space.path / "measured" / "measure", mixed)
    with h5py.File(mixed / "block-00002.h5", "r+") as file:
        file.attrs["tokens"] = "0123"
    expect(space, "of-mixed-statistics", 2, [r"those of block 2\)", "the statistics have 0123"], settings=(f"sensitivity.reuse={mixed}",))
    expect(space, "no-statistics", 2, ["missing", "isobath measure"], settings=("sensitivity.reuse=nowhere",))


def models(space):
    def broken(name, change):
        directory = model_with(space, name)
        change(space.path / f"model-{name}")
        return space.config(name, model=directory)

    second = "model-00002-of-00002.safetensors"
    expect(space, "missing-shard", 3, [second], broken("missing-shard", lambda path: (path / second).unlink()))
    expect(space, "truncated-shard", 3, [second],
           broken("truncated-shard", lambda path: os.truncate(path / second, (path / second).stat().st_size - 7)))

    def point_to_nothing(path):
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["model.layers.9.nowhere.weight"] = second
        index.write_text(json.dumps(content))

    expect(space, "absent-tensor", 3, ["model.layers.9.nowhere.weight"], broken("absent-tensor", point_to_nothing))

    def misshape(weights):
        weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:, : HIDDEN // 2]

    expect(space, "other-shape", 3, ["model.layers.1.mlp.up_proj", str(HIDDEN // 2)],
           space.config("other-shape", model=model_with(space, "other-shape", edit=misshape)))
    expect(space, "architecture", 3, ["GPTNeoXForCausalLM", "LlamaForCausalLM"],
           space.config("architecture", model=model_with(space, "architecture", {"architectures": ["GPTNeoXForCausalLM"]})))

    def spoil(weights):
        weights["model.layers.2.self_attn.o_proj.weight"][1, 2] = numpy.nan

    expect(space, "nan", 5, [r"layers\.2|block 2"], space.config("nan", model=model_with(space, "nan", edit=spoil)))


def token_files(space):
    tokens = numpy.random.default_rng(5).integers(0, VOCAB, (SEQUENCES, LENGTH))
    tokens[3, 7] = VOCAB
    for name, content, mentions in (("token-too-large", tokens, [str(VOCAB), "3", "7"]),
                                    ("no-tokens", numpy.zeros((0, LENGTH)), ["token"])):
        path = write_tokens(space.path / f"{name}.safetensors", tokens=content)
        expect(space, name, 3, mentions, space.config(name, calibration={"tokens": str(path)}))
    path = write_tokens(space.path / "padded.safetensors", lengths=[LENGTH, LENGTH - 4] + [LENGTH] * (SEQUENCES - 2))
    expect(space, "padded-windows", 3, ["window 1", str(LENGTH - 4), "padding"],
           space.config("padded-windows", evaluation={"tokens": str(path)}))
    expect(space, "absent-windows", 4, ["absent.safetensors"],
           space.config("absent-windows", evaluation={"tokens": str(space.path / "absent.safetensors")}))
    expect(space, "absent-tokens", 4, ["absent.safetensors"],
           space.config("absent-tokens", calibration={"tokens": str(space.path / "absent.safetensors")}))


def directories(space):
    config, output = space.config("taken"), space.path / "taken"
    first = Job(config, stages=2)
    assert first.wait_for(lambda: (output / "run.json").exists()), first.wait().stderr
    # It stands still meanwhile, so that it is at work however long the second takes to start.
    ranks = first.ranks()
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    second = run(config, stages=1)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    assert len(ranks) == 2, "the first run ended before the second was started"
    assert second.code == 2 and len(second.errors()) == 1 and "in use" in second.stderr, second.stderr
    print(f"in use: {second.errors()[0]}", flush=True)
    assert first.wait().code == 0, first.stderr
    third = run(config, stages=1)
    assert third.code == 2 and len(third.errors()) == 1 and "finished" in third.stderr, third.stderr
    print(f"finished: {third.errors()[0]}", flush=True)
    other = run(config, stages=1, settings=("quantization.bits=4",), resume=True)
    assert other.code == 6 and "quantization.bits: 3 in the run, 4 now" in other.stderr, other.stderr
    if " avx2 " in Path("/proc/cpuinfo").read_text():
        elsewhere = run(config, stages=1, resume=True, environment={"ISOBATH_KERNELS": "aten"})
        assert elsewhere.code == 6 and re.search(r"kernels.*: avx\w+ in the run, aten now", elsewhere.stderr), elsewhere.stderr
        launcher, _, _, _, *program = command(space.config("unlike"), replicas=RANKS)
        unlike = subprocess.run([launcher, "--quiet", "-n", "1", "-x", "ISOBATH_KERNELS=aten", *program, ":", "-n", "1", *program],
                                env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert unlike.returncode == 2 and re.search(r"different ways.*aten kernels.*avx\w+ kernels", unlike.stderr), unlike.stderr
        assert not (space.path / "unlike").exists()
    expect(space, "nothing-to-resume", 2, ["resume"], resume=True)
    (space.path / "a-file").write_text("not a directory")
    expect(space, "a-file", 4, ["a-file"])


def full_disk(space):
    if os.geteuid() != 0:
        print("SKIPPED: a full disk needs a small mount, and that needs root; one_rank_fails.py has a limit on file sizes")
        return
    output = space.path / "full"
    output.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(output)], capture_output=True, text=True)
    if mounted.returncode != 0:
        print(f"SKIPPED: a full disk needs a small mount: {mounted.stderr.strip()}")
        return
    try:
        expect(space, "full", 4, ["space"])
    finally:
        subprocess.run(["umount", "-l", str(output)], check=True)


with Workspace() as workspace:
    run_well(workspace.config("good"), stages=RANKS)
    shutil.rmtree(workspace.path / "good")
    for group in (configurations, other_statistics, models, token_files, directories, full_disk):
        group(workspace)
assert not failures, "\n".join(failures)
