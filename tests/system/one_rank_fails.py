"""One rank fails, all ranks end: soon, with one message that says why, and with nothing that looks finished."""
import itertools
import os
import resource
import signal
import time

import numpy

from isobath_system import BLOCKS, END_AFTER_DEATH_S, Job, Workspace, model_weights, run_well, write_model

LAYOUTS = [(2, 1), (1, 2)]


def assert_unfinished(output):
    assert not (output / "model").exists(), f"{output} looks finished"
    assert not (output / "evaluation.json").exists(), f"{output} looks finished"


def a_nan_weight(space):
    weights = model_weights(1)
    module = f"model.layers.{BLOCKS - 1}.mlp.down_proj"
    weights[f"{module}.weight"][3, 5] = numpy.nan
    space.model = write_model(space.path / "nan", weights=weights)
    # Streamed, the thread that reads ahead finds it.
    for residency, (stages, replicas) in itertools.product(("resident", "streamed"), LAYOUTS):
        name = f"nan-{residency}-{stages}x{replicas}"
        job = Job(space.config(name), stages=stages, replicas=replicas, settings=(f"residency={residency}",)).wait()
        assert job.code == 5, f"exit code {job.code}\n{job.stderr}"
        assert len(job.errors()) == 1, job.stderr
        assert f"layers.{BLOCKS - 1}" in job.errors()[0] or f"block {BLOCKS - 1}" in job.errors()[0], job.errors()
        assert_unfinished(space.path / name)
        print(f"{name}: {job.seconds:.1f} s: {job.errors()[0]}", flush=True)


def a_disk_that_is_full_for_one_rank(space):
    config, output = space.config("full"), space.path / "full"
    job = Job(config, stages=2)
    assert job.wait_for(lambda: (output / "run.json").exists()), job.wait().stderr
    # A limit on file sizes fails a write as a full disk does, and can be set for one process.
    limit_bytes = 2048
    resource.prlimit(job.ranks()[-1], resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    job.wait()
    assert job.code == 4, f"exit code {job.code}\n{job.stderr}"
    assert len(job.errors()) == 1, job.stderr
    assert_unfinished(output)
    print(f"full: {job.errors()[0]}", flush=True)
    run_well(config, stages=2, resume=True)


def a_killed_rank(space):
    for rank in range(2):
        output = space.path / f"killed-{rank}"
        job = Job(space.config(output.name), stages=2)
        assert job.wait_for(lambda: (output / "measure").exists()), job.wait().stderr
        os.kill(job.ranks()[rank], signal.SIGKILL)
        killed = time.monotonic()
        job.wait(END_AFTER_DEATH_S)
        assert job.code != 0
        assert_unfinished(output)
        print(f"killed rank {rank}: code {job.code}, {time.monotonic() - killed:.1f} s later", flush=True)


def a_rank_that_stands_still(space):
    output = space.path / "still"
    limit_s = 3
    job = Job(space.config(output.name), stages=2, settings=(f"ranks.watchdog_s={limit_s}",))
    assert job.wait_for(lambda: (output / "run.json").exists()), job.wait().stderr
    os.kill(job.ranks()[1], signal.SIGSTOP)
    job.wait(limit_s + END_AFTER_DEATH_S)
    assert job.code == 7, f"exit code {job.code}\n{job.stderr}"
    assert "rank 0" in job.stderr, job.stderr
    assert_unfinished(output)
    print(f"still: {job.seconds:.1f} s", flush=True)


with Workspace() as workspace:
    a_disk_that_is_full_for_one_rank(workspace)
    a_killed_rank(workspace)
    a_rank_that_stands_still(workspace)
    a_nan_weight(workspace)
