"""A matrix of runs, read from YAML: models x grids x seeds of the calibration sample x configurations.

settings        size of the runs by name (--setting): sequences, length, window, windows, seeds
models          name -> model (directory), calibration and evaluation (token files that rows are sampled from); length:
                the most tokens of a sequence or window, which are more in number then (the model knows no longer ones)
base            isobath's keys that all configurations share
grids           name -> isobath's keys of the grid
configurations  name -> {set: keys that differ from base} for isobath, or {peer: script, options: [...]}; with
                budget and method: widths come from `isobath allocate`; models and grids: names it is limited to
scores          what `isobath allocate` chooses by: widths (bits), whose checkpoints are made with the keys of `set` and then
                scored on so many `sequences` of this `length`, with `samples` label draws each
"""
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

# Keys that what `isobath measure` leaves depends on; every other key may differ between runs that share it.
MEASURED = ("sensitivity.loss", "sensitivity.samples", "sensitivity.row_groups", "sensitivity.grouping",
            "sensitivity.grouping_sequences", "sensitivity.per_sequence", "sensitivity.probes",
            "sensitivity.covariance")
REFERENCE = "default"


def digest_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """One checkpoint to make and judge."""
    model: str
    grid: str
    seed: int
    configuration: str
    keys: dict = field(hash=False)  # isobath's keys, complete
    peer: str = ""  # script in bench/peers; empty: isobath
    options: tuple = ()  # of that script
    budget: float = 0.0  # stored bits a weight for `isobath allocate`; 0: no allocation
    method: str = ""

    @property
    def name(self):
        return f"{self.model}/{self.grid}/seed-{self.seed}/{self.configuration}"

    @property
    def group(self):
        """Runs judged in one pass: one model and seed."""
        return f"{self.model}/{self.grid}/seed-{self.seed}"

    @property
    def needs_measure(self):
        return not self.peer and (self.budget > 0 or (self.keys.get("quantization.weighting") != "none"
                                                      and self.keys.get("quantization.solver") != "round_to_nearest"))

    def measured_keys(self):
        return {key: self.keys[key] for key in MEASURED if key in self.keys}

    def measure_name(self):
        return f"{self.model}/measure-{self.seed}-{digest_of(self.measured_keys())[:12]}"

    def score_name(self, scores):
        """Of the statistics that widths are allocated by: runs of equal keys share them, whatever their budgets."""
        return f"{self.model}/scores-{self.seed}-{digest_of([self.keys, scores])[:12]}"

    def fingerprint(self, setting):
        """Of everything that the result depends on but files and program: a result with another one is made again."""
        return digest_of([self.keys, self.peer, list(self.options), self.budget, self.method, setting])[:16]


@dataclass(frozen=True)
class Matrix:
    models: dict
    setting: dict
    runs: list
    scores: dict

    def setting_of(self, model):
        """The setting for a model: as many tokens, in sequences and windows that are not longer than it allows."""
        found = dict(self.setting)
        for count, length in (("sequences", "length"), ("windows", "window")):
            limit = self.models[model].get("length", found[length])
            if found[length] > limit:
                found[count], found[length] = found[count] * found[length] // limit, limit
        return found


def read(path, setting_name):
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    known = {"settings", "models", "base", "grids", "configurations", "scores"}
    if set(data) - known:
        raise SystemExit(f"{path}: unknown {', '.join(sorted(set(data) - known))}; known: {', '.join(sorted(known))}")
    if setting_name not in data["settings"]:
        raise SystemExit(f"{path}: no setting {setting_name!r}; there are: {', '.join(data['settings'])}")
    setting = data["settings"][setting_name]
    runs = []
    for model in data["models"]:
        for grid, grid_keys in data["grids"].items():
            for seed in range(setting["seeds"]):
                for name, entry in data["configurations"].items():
                    entry = entry or {}
                    unknown = set(entry) - {"set", "peer", "options", "budget", "method", "models", "grids"}
                    if unknown:
                        raise SystemExit(f"{path}: configuration {name}: unknown {', '.join(sorted(unknown))}")
                    if model in entry.get("models", [model]) and grid in entry.get("grids", [grid]):
                        keys = {**data.get("base", {}), **grid_keys, **entry.get("set", {})}
                        runs.append(Run(model, grid, seed, name, keys, entry.get("peer", ""),
                                        tuple(map(str, entry.get("options", []))), entry.get("budget", 0.0),
                                        entry.get("method", "quadratic")))
    scores = data.get("scores", {})
    if not scores and any(run.budget > 0 for run in runs):
        raise SystemExit(f"{path}: a configuration has a budget, but there are no `scores` to allocate by")
    return Matrix(data["models"], setting, runs, scores)
