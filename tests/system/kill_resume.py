"""A run whose rank is killed with signal 9 at a random moment, and then resumed, ends with the bytes of an undisturbed one."""
import os
import signal
import time

from isobath_system import (BLOCKS, CLUSTERED, DRIFTING, END_AFTER_DEATH_S, EVERYTHING_ON, TUNED, Job, Workspace, assert_same_bytes, result_digests,
                            run_well, seeded_random)

KILLS = 3
# Of the duration of the undisturbed run, counted from the moment at which run.json exists.
EARLIEST, LATEST = 0.02, 0.95
VARIANTS = {"plain": (), "everything on": EVERYTHING_ON, "drift": DRIFTING, "clustered": CLUSTERED, "tuned": TUNED}

chance = seeded_random()
planted = 0


def kill_once(config, output, duration, settings, resume, landmark="run.json"):
    """Starts the run and kills a rank at a random moment after the landmark; whether it was killed before it was done."""
    job = Job(config, stages=2, replicas=1, settings=settings, resume=resume)
    job.wait_for(lambda: (output / landmark).exists())
    moment = chance.uniform(EARLIEST, LATEST) * duration if duration else 0
    time.sleep(moment)
    ranks = job.ranks()
    if not job.running() or not ranks:
        job.wait()
        return False
    victim = chance.randrange(len(ranks))
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    job.wait(END_AFTER_DEATH_S)
    print(f"  rank {victim} killed after {moment:.2f} s: code {job.code}, ended {time.monotonic() - killed:.1f} s later",
          flush=True)
    return job.code != 0


for variant, settings in VARIANTS.items():
    with Workspace() as space:
        undisturbed = space.config("undisturbed")
        job = Job(undisturbed, stages=2, settings=settings)
        assert job.wait_for(lambda: (space.path / "undisturbed" / "run.json").exists()), job.wait().stderr
        began = time.monotonic()
        job.wait()
        assert job.code == 0, job.stderr
        duration = time.monotonic() - began
        expected = result_digests(space.path / "undisturbed")
        print(f"{variant}: undisturbed {duration:.2f} s after run.json", flush=True)

        killed = 0
        for attempt in range(4 * KILLS):
            if killed == KILLS:
                break
            name = f"killed-{attempt}"
            output, config = space.path / name, space.config(name)
            if not kill_once(config, output, duration, settings, resume=False):
                continue
            killed += 1
            # What a kill rarely meets: a block half written.
            for unfinished in output.glob("model*.partial"):
                (unfinished / ".model-00002-of-00005.safetensors.tmp-1").write_text("half")
                planted += 1
            # The second of the kills is followed by another one; the last is continued by another layout of ranks, with
            # streamed weights.
            if killed == 2:
                kill_once(config, output, duration / 2, settings, resume=True)
            stages, replicas = (1, 2) if killed == KILLS else (2, 1)
            streamed = ("residency=streamed",) if killed == KILLS and settings is not TUNED else ()
            run_well(config, stages=stages, replicas=replicas, settings=settings + streamed, resume=True)
            assert_same_bytes(expected, result_digests(output), f"{variant}, kill {killed}")
        assert killed == KILLS, f"only {killed} of {KILLS} kills met a running job"
        # All blocks are done, the model is not: the generation that random moments rarely meet.
        for attempt in range(KILLS):
            name = f"last-{attempt}"
            output, config = space.path / name, space.config(name)
            if kill_once(config, output, 0, settings, resume=False, landmark=f"checkpoint/gen-{BLOCKS:06}"):
                run_well(config, stages=2, settings=settings, resume=True)
                assert_same_bytes(expected, result_digests(output), f"{variant}, killed after the last block")
                break
        # The codes are there and scales are tuned, or the tuned model is written; the generations after those of the blocks
        # are its steps'.
        continued = 0
        for attempt in range(2 * KILLS if settings is TUNED else 0):
            name = f"tuning-{attempt}"
            output, config = space.path / name, space.config(name)
            landmark = f"checkpoint/gen-{BLOCKS + 1 + attempt // 2:06}" if attempt % 2 else "model.untuned/config.json"
            if kill_once(config, output, duration / 10, settings, resume=False, landmark=landmark):
                saved = [int(path.name[4:]) for path in (output / "checkpoint").glob("gen-*[0-9]")]
                was_tuning = max(saved, default=0) > BLOCKS and not (output / "model").exists()
                job = run_well(config, stages=1, replicas=2, settings=settings, resume=True)
                assert_same_bytes(expected, result_digests(output), f"{variant}, killed while scales were tuned")
                assert not (output / "model.untuned").exists(), "the untuned model was kept"
                if was_tuning:
                    assert "resuming the tuning of scales at step" in job.stderr, job.stderr
                    continued += 1
        assert continued > 0 or settings is not TUNED, "of all kills none met a saved step of the tuning"
        # Resuming what is finished changes nothing.
        run_well(undisturbed, stages=2, settings=settings, resume=True)
        assert_same_bytes(expected, result_digests(space.path / "undisturbed"), "resumed after the end")
assert planted > 0, "of all kills none met a model in the making"
