"""launch/slurm.sbatch and `srun --mpi=pmix` under a real Slurm of two nodes on this machine: a run, a run that is stopped with
USR1 and queues itself again, and one that Slurm kills and starts again end with the bytes of a run under mpirun. One that would get
nowhere is not queued again.

The Slurm is the test's own: daemons, ports, key and state in a temporary directory. Skipped (exit code 77) where its programs are
missing or this is not root: apt-get install slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge.
"""
import contextlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from isobath_system import ENVIRONMENT, Workspace, assert_same_bytes, binary, result_digests, run_well, write_tokens

ROOT = pathlib.Path(__file__).resolve().parents[2]
SKIPPED = 77
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "mungekey")
NODES = 2
LONG = 2000  # sequences that take some seconds to measure
START_S, JOB_S = 60, 180  # that daemons and jobs may take on a busy machine
RESTART_S = 4
CHECK_S = 5  # long enough for a signal to meet it
CONFIGURATION = """
ClusterName=isobath
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def consecutive_ports(n):
    """The first of n ports in a row that nobody listens on."""
    for first in range(17101, 30000, n):
        sockets = [socket.socket() for _ in range(n)]
        try:
            for offset, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def wait_for(condition, what, limit_s, log=None):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} took more than {limit_s} s\n{log() if log else ''}"
        time.sleep(0.1)


class Cluster:
    """A Slurm of NODES nodes, which all are this machine."""

    def __enter__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="isobath-slurm-"))
        self.daemons = []
        self.environment = {
            # The nodes share a host name and /dev/shm: segments of shared memory would collide.
            **ENVIRONMENT, "OMPI_MCA_btl": "self,tcp", "SLURM_CONF": str(self.folder / "slurm.conf"), "ISOBATH_PROGRAM": binary(),
            "ISOBATH_ROOT": str(ROOT)}
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self):
        for name in ("state", *(f"{kind}-n{node}" for kind in ("spool", "tmp") for node in range(1, NODES + 1))):
            (self.folder / name).mkdir()
        port = consecutive_ports(NODES + 1)
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(
            folder=self.folder, controller_port=port, nodes=NODES, ports=f"{port + 1}-{port + NODES}"))
        self.call("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        self.daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={self.folder}/munge.key",
                    f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed")
        wait_for((self.folder / "munge.socket").exists, "munged", START_S)
        self.daemon("slurmctld", "-D", "-c")
        for node in range(1, NODES + 1):
            self.daemon("slurmd", "-D", "-N", f"n{node}")
        wait_for(lambda: self.call("sinfo", "--noheader", "--format=%t %D", check=False).split() == ["idle", str(NODES)],
                 "starting Slurm", START_S, self.logs)

    def __exit__(self, *_):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def daemon(self, *line):
        with (self.folder / f"{line[0]}.out").open("ab") as output:
            self.daemons.append(subprocess.Popen(line, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                                                 stderr=subprocess.STDOUT))

    def logs(self):
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                         for pattern in ("*.out", "*.log") for path in sorted(self.folder.glob(pattern)))

    def call(self, *line, check=True):
        job = subprocess.run([str(word) for word in line], env=self.environment, capture_output=True, text=True, timeout=JOB_S)
        assert job.returncode == 0 or not check, f"exit code {job.returncode}: {line}\n{job.stdout}\n{job.stderr}\n{self.logs()}"
        return job.stdout

    @contextlib.contextmanager
    def program(self, path):
        """Jobs submitted meanwhile start another program."""
        usual = self.environment["ISOBATH_PROGRAM"]
        self.environment["ISOBATH_PROGRAM"] = str(path)
        try:
            yield
        finally:
            self.environment["ISOBATH_PROGRAM"] = usual

    def submit(self, config, log):
        found = self.call("sbatch", "--parsable", f"--nodes={NODES}", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10",
                          f"--output={log}", ROOT / "launch/slurm.sbatch", config, "--set", "ranks.stages=1", "--set", "ranks.replicas=2")
        return found.strip()

    def job(self, number):
        """State, restarts and exit code of a job."""
        text = self.call("scontrol", "show", "job", number)
        return tuple(re.search(pattern, text).group(1) for pattern in (r"JobState=(\w+)", r"Restarts=(\d+)", r"ExitCode=(\d+)"))

    def start_again(self, number, log):
        """A job that was queued again waits two minutes unless told to start; at once, the nodes would take it for the killed one."""
        wait_for(lambda: self.job(number)[0] == "PENDING", f"queueing job {number} again", JOB_S, lambda: log.read_text() + self.logs())
        self.call("scontrol", "update", f"JobId={number}", f"StartTime=now+{RESTART_S}seconds")

    def wait_for_end(self, number, expected, log):
        def ended():
            return self.job(number)[0] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(ended, f"job {number}", JOB_S, lambda: log.read_text() + self.logs())
        assert self.job(number) == expected, f"{self.job(number)}, not {expected}\n{log.read_text()}\n{self.logs()}"

    def wait_until_completed(self, number, restarts, log):
        self.wait_for_end(number, ("COMPLETED", str(restarts), "0"), log)

    def wait_until_failed(self, number, code, log):
        self.wait_for_end(number, ("FAILED", "0", str(code)), log)


def generations(output):
    return len(list((output / "checkpoint").glob("gen-*[0-9]")))


def main():
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        print(f"SKIPPED: {f'no {missing[0]}' if missing else 'not root'}")
        return SKIPPED
    # Enough blocks' work to be met in the middle of quantize.
    work = {"quantization": {"reestimate": {"policy": "every", "blocks": 1}}}
    with Workspace() as space, Cluster() as cluster:
        run_well(space.config("mpirun", **work), replicas=2)
        expected = result_digests(space.path / "mpirun")

        log = space.path / "plain.log"
        cluster.wait_until_completed(cluster.submit(space.config("plain", **work), log), 0, log)
        assert_same_bytes(expected, result_digests(space.path / "plain"), "sbatch")
        print("sbatch: a job, the bytes of mpirun", flush=True)

        config = space.config("srun", **work)
        cluster.call("srun", "--mpi=pmix", "-K", f"--nodes={NODES}", f"--ntasks={NODES}", binary(), "run", config, "--set",
                     "ranks.replicas=2", "--set", "ranks.stages=1")
        assert_same_bytes(expected, result_digests(space.path / "srun"), "srun")
        print("srun --mpi=pmix: the same", flush=True)

        for name, interrupt in (("stopped", ("scancel", "-b", "-s", "USR1")), ("killed", ("scontrol", "requeue"))):
            log, output = space.path / f"{name}.log", space.path / name
            number = cluster.submit(space.config(name, **work), log)
            wait_for(lambda: generations(output) > 0, f"the first saved state of job {number}", JOB_S, cluster.logs)
            cluster.call(*interrupt, number)
            cluster.start_again(number, log)
            cluster.wait_until_completed(number, 1, log)
            assert "resuming" in log.read_text(), f"the second start did not go on from the first:\n{log.read_text()}"
            assert_same_bytes(expected, result_digests(output), name)
            print(f"{' '.join(interrupt)}: queued again, resumed, the same", flush=True)

        # Stopped while measuring, which keeps nothing: the next job would get no further.
        log, output = space.path / "early.log", space.path / "early"
        write_tokens(space.path / "long.safetensors", sequences=LONG)
        number = cluster.submit(space.config("early", calibration={"tokens": str(space.path / "long.safetensors"), "sequences": LONG,
                                                                   "logical_shards": LONG}), log)
        wait_for(lambda: log.exists() and "measure:" in log.read_text(), f"starting job {number}", JOB_S, cluster.logs)
        cluster.call("scancel", "-b", "-s", "USR1", number)
        cluster.wait_until_failed(number, 75, log)
        assert f"slurm: stopped before {output} had a finished stage" in log.read_text(), log.read_text()

        # Stopped while the configuration is checked, before there are ranks.
        log, slow = space.path / "checked.log", space.path / "slow_check"
        slow.write_text(f"""#!/bin/sh
[ "$1" != check ] || {{ echo checking >&2; sleep {CHECK_S}; }}
exec {binary()} "$@"
""")
        slow.chmod(0o755)
        with cluster.program(slow):
            number = cluster.submit(space.config("checked", **work), log)
        wait_for(lambda: log.exists() and "checking" in log.read_text(), f"checking the configuration of job {number}", JOB_S,
                 cluster.logs)
        cluster.call("scancel", "-b", "-s", "USR1", number)
        cluster.wait_until_failed(number, 75, log)
        assert "slurm: stopped before the ranks of" in log.read_text(), log.read_text()
        assert not (space.path / "checked").exists()

        # What is wrong with a configuration is said before ranks start.
        log = space.path / "wrong.log"
        cluster.wait_until_failed(cluster.submit(space.config("wrong", quantization={"bits": 17}), log), 2, log)
        assert "quantization.bits" in log.read_text() and "mpirun" not in log.read_text(), log.read_text()
        print("stopped without progress, wrong configuration: not queued again", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
