#!/usr/bin/env python3
"""Runs a matrix of configurations over seeds of the calibration sample and writes one table of what each is worth.

  bench/quality/prepare.sh
  bench/quality/run.py bench/quality/defaults.yaml --setting quick --output runs/quality [--only REGEX] [--max-minutes 30]

Every (model, grid, seed) is a group: its checkpoints are made one after the other, isobath's sharing what was
measured, peers by their own scripts; one pass of `isobath evaluate` judges those that have no result yet, and the
checkpoints are deleted. With --jobs many runs are made at once and each is judged alone: for a GPU that one small
model leaves idle. A result is kept in results.json of the output and not made again unless its keys change,
so a matrix may be run piecewise and stopped at any moment. MATRIX.md and MATRIX.json there are written anew after
each group.

Calibration: seed s takes a random sample of rows of the model's token file (NumPy's generator with that seed), the
same for all configurations and peers. Evaluation: one sample, the same for all. Paths of the matrix start at the
current directory. As root, first `source launch/setup.sh && isobath_environment` for Open MPI's settings.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from safetensors import safe_open

import matrix as matrices
import table

ROOT = Path(__file__).resolve().parents[2]
EVALUATION_SEED = 1 << 20  # apart from those of the calibration samples
CHECKPOINTS_A_PASS = 8  # judged at once: they and the original are in memory together


class Failed(Exception):
    pass


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--setting", default="full", help="size of the runs, one of the matrix's settings")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose model/grid/seed-N/configuration matches")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="starts no group or run after that time")
    parser.add_argument("--isobath", type=Path, default=ROOT / "build/cpu/bin/isobath")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a rank; peers get ranks x threads")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32", help="in which all compute")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="on which all compute")
    parser.add_argument("--jobs", type=int, default=1, help="runs made at once; what they print is in the order they end")
    parser.add_argument("--keep", action="store_true", help="keeps the checkpoints")
    return parser.parse_args()


def sample_rows(source, output, n_rows, length, seed):
    """Writes a token file with n_rows random full rows of `source`, cut to `length`; nothing when it exists."""
    if output.exists():
        return
    file = load_file(source)
    with safe_open(source, framework="np") as opened:
        attributes = opened.metadata()
    full = np.flatnonzero(file["lengths"] >= length) if "lengths" in file else np.arange(len(file["tokens"]))
    if len(full) < n_rows or file["tokens"].shape[1] < length:
        raise SystemExit(f"{source}: {n_rows} rows of {length} tokens are needed, it has {len(full)} of "
                         f"{file['tokens'].shape[1]}")
    chosen = np.sort(np.random.default_rng(seed).choice(full, n_rows, replace=False))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(f".{threading.get_ident()}.tmp")
    save_file({"tokens": np.ascontiguousarray(file["tokens"][chosen, :length]),
               "lengths": np.full(n_rows, length, np.int32)}, temporary, metadata=attributes)
    temporary.rename(output)


class Bench:
    def __init__(self, options, matrix):
        self.options, self.matrix, self.folder = options, matrix, (options.output / options.setting).absolute()
        self.deadline = time.monotonic() + 60 * options.max_minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store = self.folder / "results.json"
        self.state = json.loads(self.store.read_text()) if self.store.exists() else {"results": {}, "originals": {}}
        self.changing = threading.Lock()  # the state and the files written from it
        self.making = defaultdict(threading.Lock)  # a directory that several runs share
        self.program = ""  # what isobath calls itself, asked for when a run is made

    def build(self):
        """Version and revision of the program: results are kept when it changes, and the table tells."""
        if not self.program:
            found = subprocess.run([str(self.options.isobath), "version"], capture_output=True, text=True, check=False)
            if found.returncode != 0:
                raise Failed(f"{self.options.isobath} version: exit code {found.returncode}: {found.stderr.strip()}")
            self.program = found.stdout.split("\n")[0]
        return self.program

    def save(self):
        temporary = self.store.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.rename(self.store)

    def is_done(self, run):
        found = self.state["results"].get(run.name)
        return found is not None and found["fingerprint"] == run.fingerprint(self.matrix.setting_of(run.model))

    def call(self, command, log):
        """Seconds of a command; what it prints goes to a log file."""
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            found = subprocess.run([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, check=False)
        if found.returncode != 0:
            raise Failed(f"exit code {found.returncode}; the end of {log}:\n" + "\n".join(
                log.read_text(encoding="utf-8").rstrip().split("\n")[-6:]))
        return time.perf_counter() - start

    def isobath(self, subcommand, run, keys, log, *more, ranks=None):
        """Runs isobath with a configuration file of `keys` beside the log."""
        setting, model = self.matrix.setting_of(run.model), self.matrix.models[run.model]
        complete = {
            "model": model["model"], "ranks.threads": self.options.threads, "ranks.device": self.options.device,
            "compute_dtype": self.options.dtype,
            "calibration.tokens": str(self.calibration(run)), "calibration.sequences": setting["sequences"],
            "calibration.length": setting["length"], "evaluation.window": setting["window"],
            "evaluation.windows": setting["windows"], "sensitivity.per_sequence": "off", **keys}
        config = log.with_suffix(".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(nested(complete), indent=1) + "\n", encoding="utf-8")
        n_ranks = self.options.ranks if ranks is None else ranks
        launcher = ["mpirun", "-n", n_ranks] if n_ranks > 1 else []
        return self.call([*launcher, self.options.isobath, subcommand, config, *more], log)

    def calibration(self, run):
        path = self.folder / run.model / f"calibration-{run.seed}.safetensors"
        setting = self.matrix.setting_of(run.model)
        sample_rows(Path(self.matrix.models[run.model]["calibration"]), path, setting["sequences"], setting["length"],
                    run.seed)
        return path

    def measure(self, run):
        """The run directory with the statistics that `run` needs, and the seconds it cost once."""
        directory = self.folder / run.measure_name()
        log = self.folder / "logs" / f"{run.measure_name()}.log"
        done = directory / "seconds.json"
        with self.making[directory]:
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                seconds = self.isobath("measure", run, {**run.measured_keys(), "output": str(directory)}, log)
                done.write_text(json.dumps(seconds), encoding="utf-8")
        return directory, json.loads(done.read_text())

    def score(self, run, measured):
        """The keys of the statistics that widths are allocated by, and the seconds that these cost once: a checkpoint of
        each width, and its scores on shorter and more sequences than the calibration has."""
        scores, directory = self.matrix.scores, self.folder / run.score_name(self.matrix.scores)
        log, done = self.folder / "logs" / run.score_name(scores), directory / "seconds.json"
        tokens = self.folder / run.model / f"scores-{run.seed}-{scores['sequences']}x{scores['length']}.safetensors"
        sample_rows(Path(self.matrix.models[run.model]["calibration"]), tokens, scores["sequences"], scores["length"],
                    run.seed)
        # Beside the directory of the run, which isobath makes itself.
        widths = directory.with_name(directory.name + "-widths")
        of_width = {bits: widths / f"{bits}-bit" for bits in scores["bits"]}
        keys = {**run.keys, "output": str(directory), "calibration.tokens": str(tokens),
                "calibration.sequences": scores["sequences"], "calibration.length": scores["length"],
                "sensitivity.samples": scores["samples"], "sensitivity.gram.bits": scores["bits"],
                "sensitivity.gram.checkpoints": [str(path / "model") for path in of_width.values()]}
        with self.making[directory]:
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                shutil.rmtree(widths, ignore_errors=True)
                seconds = 0.0
                for bits, path in of_width.items():
                    seconds += self.isobath("run", run, {
                        **run.keys, **scores.get("set", {}), "quantization.bits": bits, "output": str(path),
                        "sensitivity.reuse": str(measured / "measure")}, log / f"{bits}-bit.log")
                seconds += self.isobath("measure", run, keys, log / "measure.log")
                shutil.rmtree(widths)
                done.write_text(json.dumps(seconds), encoding="utf-8")
        return keys, json.loads(done.read_text())

    def make(self, run, directory):
        """Makes the checkpoint of a run; returns what is known of it without evaluating."""
        log = self.folder / "logs" / f"{run.name}.log"
        if run.peer:
            return self.make_peer(run, directory, log)
        keys, seconds = {**run.keys, "output": str(directory)}, 0.0
        if run.needs_measure:
            measured, seconds = self.measure(run)
            keys["sensitivity.reuse"] = str(measured / "measure")
            if run.budget > 0:
                scored_keys, scoring = self.score(run, measured)
                widths = self.folder / "logs" / f"{run.name}-bits.yaml"
                widths.parent.mkdir(parents=True, exist_ok=True)
                seconds += scoring + self.isobath("allocate", run, scored_keys, log.with_suffix(".allocate"), "--budget",
                                                  run.budget, "--method", run.method, "--output", widths, ranks=1)
                keys["quantization.allocation"] = str(widths)
        seconds += self.isobath("run", run, keys, log)
        events = map(json.loads, (directory / "events.jsonl").read_text(encoding="utf-8").splitlines())
        return {"seconds": seconds, "program": self.build(),
                "bits_per_weight": next(one["bits_per_weight"] for one in events if one["event"] == "quantized")}

    def make_peer(self, run, directory, log):
        environment = {"peer_llmcompressor.py": "llmcompressor", "peer_gptqmodel.py": "gptqmodel",
                       "peer_autoround.py": "autoround"}[run.peer]
        python = ROOT / ".cache/peers" / environment / "bin/python"
        if not python.exists():
            raise Failed(f"no {python}; run bench/peers/setup.sh {environment}")
        bits, group = run.keys["quantization.bits"], run.keys["quantization.group"]
        symmetric = run.keys.get("quantization.symmetric", True)
        self.call([python, ROOT / "bench/peers" / run.peer, self.matrix.models[run.model]["model"], self.calibration(run),
                   directory / "model", "--bits", bits, "--group", group, *([] if symmetric else ["--asymmetric"]),
                   "--dtype", self.options.dtype, "--device", self.options.device, "--threads", self.options.ranks * self.options.threads, *run.options], log)
        lines = [line for line in log.read_text(encoding="utf-8").split("\n") if line.startswith("{")]
        report = json.loads(lines[-1])
        return {"seconds": report["total_s"], "peer": report,
                "bits_per_weight": bits + (16 if symmetric else 16 + bits) / group}

    def judge(self, made):
        """Evaluates checkpoints of one model in one pass and stores the results."""
        run = made[0][0]
        name = run.group if self.options.jobs == 1 else run.name
        tokens = self.folder / run.model / "evaluation.safetensors"
        setting = self.matrix.setting_of(run.model)
        sample_rows(Path(self.matrix.models[run.model]["evaluation"]), tokens, setting["windows"], setting["window"],
                    EVALUATION_SEED)
        log = self.folder / "logs" / f"{name}-evaluate.log"
        output = log.with_suffix(".json")
        checkpoints = [part for _, directory, _ in made for part in ("--checkpoint", directory / "model")]
        self.isobath("evaluate", run, {"output": str(self.folder / "unused"), "evaluation.tokens": str(tokens)}, log,
                     *checkpoints, "--json", output)
        found = json.loads(output.read_text())  # of one checkpoint no list
        with self.changing:
            self.record(made, found if isinstance(found, list) else [found])

    def record(self, made, found):
        for (one, directory, known), metrics in zip(made, found):
            self.state["originals"][one.model] = metrics["perplexity_original"]
            self.state["results"][one.name] = {
                **known, **{key: metrics[key] for key in ("perplexity", "kl_mean", "kl_median", "kl_p99", "top1_agreement")},
                "fingerprint": one.fingerprint(self.matrix.setting_of(one.model))}
            print(f"{one.name}: perplexity {metrics['perplexity']:.3f}, KL {metrics['kl_mean']:.4f}, "
                  f"{known['seconds']:.0f} s", flush=True)
            if not self.options.keep:
                shutil.rmtree(directory, ignore_errors=True)
        self.save()
        self.write_table()

    def write_table(self):
        valid = {run.name: self.state["results"][run.name] for run in self.matrix.runs if self.is_done(run)}
        found = table.rows(valid, self.matrix.runs)
        stem = self.folder / self.options.matrix.stem
        stem.with_suffix(".json").write_text(json.dumps({"setting": self.matrix.setting, "rows": found}, indent=1) + "\n",
                                             encoding="utf-8")
        stem.with_suffix(".md").write_text(table.markdown(found, self.state["originals"]), encoding="utf-8")

    def run_group(self, runs):
        """Returns the number of runs that failed."""
        made, n_failed = [], 0
        for run in runs:
            if time.monotonic() > self.deadline:
                break
            directory = self.folder / "made" / run.name
            shutil.rmtree(directory, ignore_errors=True)
            try:
                made.append((run, directory, self.make(run, directory)))
            except Failed as problem:
                print(f"{run.name} failed: {problem}", file=sys.stderr, flush=True)
                n_failed += 1
            if len(made) == CHECKPOINTS_A_PASS:
                self.judge(made)
                made = []
        if made:
            self.judge(made)
        return n_failed

    def run_alone(self, run):
        try:
            return self.run_group([run])
        except Failed as problem:  # of its evaluation
            print(f"{run.name} failed: {problem}", file=sys.stderr, flush=True)
            return 1

    def run_all(self, runs):
        """Returns the number of runs that failed."""
        if self.options.jobs > 1:
            with ThreadPoolExecutor(self.options.jobs) as pool:
                return sum(pool.map(self.run_alone, runs))
        return sum(self.run_group([run for run in runs if run.group == group])
                   for group in dict.fromkeys(run.group for run in runs))


def nested(flat):
    """{'a.b': 1} as {'a': {'b': 1}}."""
    result = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return result


def main():
    options = parse_arguments()
    matrix = matrices.read(options.matrix, options.setting)
    bench = Bench(options, matrix)
    missing = {name: path for name, model in matrix.models.items() for path in (model["calibration"], model["evaluation"])
               if not Path(path).exists()}
    for name, path in missing.items():
        print(f"model {name} is left out: no {path} (bench/quality/prepare.sh makes it)", flush=True)
    wanted = [run for run in matrix.runs if run.model not in missing and re.search(options.only, run.name)]
    if not wanted:
        raise SystemExit(f"{options.matrix}: no run matches {options.only!r}")
    todo = [run for run in wanted if not bench.is_done(run)]
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} done before", flush=True)
    n_failed = bench.run_all(todo)
    bench.write_table()
    print((bench.folder / options.matrix.stem).with_suffix(".md"))
    left = sum(not bench.is_done(run) for run in wanted)
    if left:
        print(f"{left} runs are left" + (f", {n_failed} of them failed" if n_failed else ""), flush=True)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
