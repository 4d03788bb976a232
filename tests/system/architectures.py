"""Every supported architecture but Llama (the other scripts' model): the same bytes for each layout of ranks, and a checkpoint
that transformers loads and that has the perplexity which the run found."""
import json
import pathlib
import shutil
import subprocess
import sys

from isobath_system import Workspace, assert_same_bytes, result_digests, run, run_well

ROOT = pathlib.Path(__file__).resolve().parents[2]
WINDOW = 16  # shorter than the sequences of a Workspace

for name in ("mistral", "qwen2", "qwen3"):
    with Workspace() as space:
        source = ROOT / "tests/data" / f"tiny_{name}"
        given = {"model": str(source), "quantization": {"bits": 4, "group": 32, "tuning": {"epochs": 1}}}
        run_well(space.config("one", **given))
        expected = result_digests(space.path / "one")
        for output, stages, replicas in (("stages", 2, 1), ("replicas", 1, 2), ("both", 2, 2)):
            run_well(space.config(output, **given), stages=stages, replicas=replicas)
            assert_same_bytes(expected, result_digests(space.path / output), f"{name}, {stages} stages, {replicas} replicas")
        given["quantization"].pop("tuning")  # needs resident weights
        run_well(space.config("resident", **given))
        run_well(space.config("streamed", **given), stages=2, settings=("residency=streamed",))
        assert_same_bytes(result_digests(space.path / "resident"), result_digests(space.path / "streamed"), f"{name}, streamed")
        subprocess.run([sys.executable, str(ROOT / "tools/python/check_checkpoint.py"), str(space.path / "one/model"), "--tokens",
                        str(space.test), "--evaluation", str(space.path / "one/evaluation.json")], check=True, timeout=120)
        print(f"{name}: the same bytes on 1, 2 and 4 ranks, resident and streamed; loaded by transformers", flush=True)

# What lies behind a window is not modelled: longer sequences are refused, shorter ones see no window.
with Workspace() as space:
    windowed = space.path / "windowed"
    shutil.copytree(ROOT / "tests/data/tiny_mistral", windowed)
    values = json.loads((windowed / "config.json").read_text()) | {"sliding_window": WINDOW}
    (windowed / "config.json").write_text(json.dumps(values))
    job = run(space.config("refused", model=str(windowed)))
    assert job.code == 2 and f"at most {WINDOW} tokens, the sliding window" in job.stderr, f"{job.code}: {job.stderr}"
    assert not (space.path / "refused").exists(), "a refused run leaves a directory"
    short = {"calibration": {"length": WINDOW}, "evaluation": {"window": WINDOW}}
    run_well(space.config("short", model=str(windowed), **short))
    run_well(space.config("without", model=str(ROOT / "tests/data/tiny_mistral"), **short))
    read = [json.loads((space.path / output / "evaluation.json").read_text())["kl_mean"] for output in ("short", "without")]
    assert read[0] == read[1], read
