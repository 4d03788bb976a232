"""What the benches of whole runs share: their arguments, a scratch directory, the program under mpirun, its events."""
import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile


def arguments_of(description, *own):
    """Parsed command line of a bench: the program, its configuration, settings; own: (flag, type, default) of the bench's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("isobath")
    parser.add_argument("config")
    for flag, kind, default in own:
        parser.add_argument(flag, type=kind, default=default)
    parser.add_argument("--set", action="append", default=[], help="key=value, as of isobath")
    return parser.parse_args()


@contextlib.contextmanager
def scratch():
    """A directory of its own in ISOBATH_BENCH_DIR or the system's, removed at the end."""
    space = pathlib.Path(tempfile.mkdtemp(prefix="isobath-bench-", dir=os.environ.get("ISOBATH_BENCH_DIR")))
    try:
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)


def run_isobath(isobath, config, output, ranks, settings, command="run", more=(), threads=1):
    """Runs the program; its standard output and error as text. Ends the bench when it fails.

    Ranks of one thread are bound to a core each where there are enough."""
    binding = "core" if threads == 1 and ranks <= (os.cpu_count() or 1) else "none"
    line = ["mpirun", "--quiet", "--bind-to", binding, "-n", str(ranks),
            isobath, command, config, "--set", f"output={output}"]
    for setting in settings:
        line += ["--set", setting]
    job = subprocess.run([*line, *more], env=dict(os.environ, OMP_NUM_THREADS=str(threads)), capture_output=True, text=True)
    if job.returncode != 0:
        raise SystemExit(f"exit code {job.returncode}: {' '.join(map(str, line))}\n{job.stdout}\n{job.stderr}")
    return job.stdout + job.stderr


def events(output):
    return [json.loads(line) for line in (pathlib.Path(output) / "events.jsonl").read_text().splitlines()]
