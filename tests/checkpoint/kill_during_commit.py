"""Kills a rank, or mpirun, at random moments while a small program commits generation after generation.

After each kill the program is started again: it must find the last generation that it reported, or the one it was
committing, with the right content (the program compares every tensor), and take over the lock of its dead predecessor.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

STARTUP_LIMIT_S = 30


def lines_until(process, prefix, deadline):
    """The lines of the process up to the first that begins with prefix; ends early when the process does."""
    lines = []
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            break
        lines.append(line.strip())
        if line.startswith(prefix):
            return lines
    return lines


def wait_until_gone(pids):
    """Ranks outlive a killed mpirun by a second; a successor must not meet them."""
    deadline = time.monotonic() + 15
    for pid in pids:
        while time.monotonic() < deadline:
            try:
                with open(f"/proc/{pid}/stat") as stat:
                    if stat.read().rsplit(")", 1)[1].split()[0] in "ZX":
                        break
            except (FileNotFoundError, ProcessLookupError):
                break
            time.sleep(0.02)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--mpiexec", default="mpirun")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    chance = random.Random(arguments.seed)
    directory = tempfile.mkdtemp(prefix="isobath-kill-")
    run, acknowledgements = os.path.join(directory, "run"), os.path.join(directory, "committed")
    acknowledged, kills, in_commit, began = 0, 0, 0, time.monotonic()
    try:
        while time.monotonic() - began < arguments.seconds:
            process = subprocess.Popen(
                [arguments.mpiexec, "--quiet", "-n", str(arguments.ranks), arguments.program, run, acknowledgements],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            lines = lines_until(process, "opened", time.monotonic() + STARTUP_LIMIT_S)
            if not lines or not lines[-1].startswith("opened"):
                process.kill()
                sys.exit(f"after {kills} kills the program did not open the store:\n{process.stderr.read()}")
            opened = int(lines[-1].split()[1])
            if opened not in (acknowledged, acknowledged + 1):
                process.kill()
                sys.exit(f"generation {opened} was opened after {acknowledged} was reported as committed")
            pids = [int(line.split()[2]) for line in lines if line.startswith("pid")]
            in_commit += opened != acknowledged
            acknowledged = opened
            time.sleep(chance.uniform(0.0, 0.35))
            victims = pids + [process.pid]
            os.kill(chance.choice(victims), signal.SIGKILL)
            process.communicate(timeout=STARTUP_LIMIT_S)
            wait_until_gone(pids)
            kills += 1
            with open(acknowledgements) as file:
                acknowledged = max([acknowledged] + [int(line) for line in file])
        names = sorted(os.listdir(os.path.join(run, "checkpoint")))
        print(f"{kills} kills, {acknowledged} generations committed, {in_commit} times one more than was reported")
        print("left:", *names)
        if kills < 3 or acknowledged < 3:
            sys.exit("too few kills or commits to mean anything")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
