"""A run is continued with other evaluation windows, with another number of ranks that would have other threads, by a job script
that is started again, and with a model and tokens that were moved; its model stays as it is."""
import json
import os
import shutil

from isobath_system import LENGTH, Workspace, result_digests, run, run_well, write_tokens


def evaluation(output):
    return json.loads((output / "evaluation.json").read_text())


with Workspace() as space:
    config, output = space.config("run", ranks={"threads": "auto"}), space.path / "run"
    refused = run(config, settings=(f"evaluation.tokens={space.path / 'absent.safetensors'}",))
    assert refused.code == 4 and "absent.safetensors" in refused.stderr and not output.exists(), refused.stderr

    started = run_well(config, settings=("ranks.threads=2",), resume="or-start")
    assert not (output / "checkpoint").exists(), "states are left that nothing will be resumed from"
    digests, first = result_digests(output), evaluation(output)

    again = run_well(config, stages=2, resume="or-start")
    assert "nothing is left to do" in again.stderr + again.stdout, again.stderr
    threads = json.loads([line for line in (output / "events.jsonl").read_text().splitlines() if '"start"' in line][-1])["threads"]
    assert threads == 2, f"{threads} threads, where the run had 2"
    if len(os.sched_getaffinity(0)) < 4:
        assert "continued with as many, on 1 core a rank" in again.stderr, again.stderr

    other = write_tokens(space.path / "other.safetensors", seed=9)
    run_well(config, stages=2, settings=(f"evaluation.tokens={other}", "evaluation.windows=3"), resume=True)
    second = evaluation(output)
    assert second["windows"] == 3 and first["windows"] == 4 and second["tokens_digest"] != first["tokens_digest"], second
    run_well(config, stages=1, resume=True)
    assert result_digests(output) == digests, "evaluating again changed what was there"

    moved = space.path / "elsewhere"
    shutil.move(space.model, moved)
    shutil.move(space.calibration, space.path / "moved.safetensors")
    run_well(config, settings=(f"model={moved}", f"calibration.tokens={space.path / 'moved.safetensors'}"), resume=True)
    assert evaluation(output)["window"] == LENGTH
    print(f"continued: {len(digests)} files as before; evaluated on {first['tokens']} and {second['tokens']} tokens")
