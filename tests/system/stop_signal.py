"""SIGUSR1 to mpirun ends a run with code 75 and its state on disk; --resume ends with the bytes of an undisturbed run."""
import json
import os
import shutil
import signal
import time

from isobath_system import BLOCKS, TUNED, Job, Workspace, assert_same_bytes, result_digests, run_well, seeded_random

STOPS = 3
LONGEST_STOP_S = 30
chance = seeded_random()

with Workspace() as space:
    # Enough work to be stopped in the middle of each stage.
    work = {"calibration": {"sequences": 8, "logical_shards": 4}, "quantization": {"reestimate": {"policy": "every", "blocks": 1}}}
    undisturbed = space.config("undisturbed", **work)
    job = Job(undisturbed, stages=2)
    assert job.wait_for(lambda: (space.path / "undisturbed" / "run.json").exists()), job.wait().stderr
    began = time.monotonic()
    job.wait()
    assert job.code == 0, job.stderr
    duration = time.monotonic() - began
    expected = result_digests(space.path / "undisturbed")

    stopped = 0
    for attempt in range(4 * STOPS):
        if stopped == STOPS:
            break
        name = f"stopped-{attempt}"
        output, config = space.path / name, space.config(name, **work)
        stops_here, resume = 0, False
        while True:
            job = Job(config, stages=2, resume=resume)
            if stops_here < 2:
                # The lock, not run.json, says that this very job is at work.
                job.wait_for(lambda: (output / "lock").exists())
                time.sleep(chance.uniform(0.0, 0.8) * duration)
                if job.running():
                    os.kill(job.process.pid, signal.SIGUSR1)
            sent = time.monotonic()
            job.wait(LONGEST_STOP_S if stops_here < 2 else 120)
            complete = json.loads((output / "run.json").read_text())["complete"] if (output / "run.json").exists() else []
            # A signal that meets mpirun after its ranks have ended ends mpirun itself: the run was not stopped.
            if job.code == 0 or (job.code == -signal.SIGUSR1 and "evaluate" in complete):
                break
            assert job.code == 75, f"exit code {job.code} after SIGUSR1:\n{job.stderr}"
            assert not (output / "lock").exists(), "a stopped run leaves its lock"
            assert "quantize" in complete or not (output / "model").exists(), \
                "a run stopped while quantizing leaves a model that looks finished"
            print(f"stopped with 75, {time.monotonic() - sent:.2f} s after the signal", flush=True)
            stops_here, resume = stops_here + 1, True
        assert_same_bytes(expected, result_digests(output), f"after {stops_here} stops")
        stopped += stops_here > 0
    assert stopped == STOPS, f"only {stopped} of {STOPS} runs were stopped before they ended"

# While scales are tuned: the steps so far are kept, and the next job goes on from them.
with Workspace() as space:
    undisturbed = space.config("undisturbed")
    run_well(undisturbed, stages=2, settings=TUNED)
    expected = result_digests(space.path / "undisturbed")
    for attempt in range(STOPS):
        output, config = space.path / f"tuned-{attempt}", space.config(f"tuned-{attempt}")
        job = Job(config, stages=2, settings=TUNED)
        # The generation after those of the blocks holds the first step.
        if job.wait_for(lambda: (output / f"checkpoint/gen-{BLOCKS + 1:06}").exists()):
            os.kill(job.process.pid, signal.SIGUSR1)
        job.wait(LONGEST_STOP_S)
        if "of the tuning; `--resume` continues there" not in job.stderr:
            continue  # the signal met a later stage
        assert job.code == 75, f"exit code {job.code} after SIGUSR1:\n{job.stderr}"
        # As a crash leaves it between the rename of the tuned model and its mark: the model is taken as it is.
        renamed = space.path / "renamed"
        shutil.copytree(output, renamed)
        shutil.copytree(space.path / "undisturbed/model", renamed / "model")
        taken = run_well(space.config("renamed"), replicas=2, settings=TUNED, resume=True)
        assert "tuning of scales" not in taken.stderr, taken.stderr
        assert_same_bytes(expected, result_digests(renamed), "with the tuned model renamed and not marked")
        assert not (renamed / "model.untuned").exists() and not (renamed / "checkpoint").exists(), sorted(renamed.iterdir())
        resumed = run_well(config, replicas=2, settings=TUNED, resume=True)
        assert "resuming the tuning of scales at step" in resumed.stderr, resumed.stderr
        assert_same_bytes(expected, result_digests(output), "stopped while scales were tuned")
        break
    else:
        raise AssertionError(f"of {STOPS} signals none met the tuning of scales")
