#!/usr/bin/env python3
"""bench/quality: what runs share, and when a configuration counts as better than the default."""
import argparse
import contextlib
import io
import sys
import tempfile
import unittest
from pathlib import Path

QUALITY = Path(__file__).resolve().parents[2] / "bench" / "quality"
sys.path.insert(0, str(QUALITY))

import matrix  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402

METRICS = {key: 1.0 for key, _, _ in table.COLUMNS}


def of_kl(*values):
    return {seed: {**METRICS, "kl_mean": value} for seed, value in enumerate(values)}


class AgainstReference(unittest.TestCase):
    def test_pairs_seeds_before_it_averages(self):
        # Seeds differ tenfold, but the configuration halves each.
        ratio, deviation, verdict = table.against_reference(of_kl(0.05, 0.5), of_kl(0.1, 1.0))
        self.assertAlmostEqual(ratio, 0.5)
        self.assertAlmostEqual(deviation, 0.0)
        self.assertEqual(verdict, "better")

    def test_seeds_that_disagree_decide_nothing(self):
        self.assertEqual(table.against_reference(of_kl(0.5, 0.5, 1.01), of_kl(1, 1, 1))[2], "within spread")

    def test_worse(self):
        self.assertEqual(table.against_reference(of_kl(1.2, 1.3), of_kl(1, 1))[2], "worse")

    def test_one_seed_says_nothing(self):
        self.assertEqual(table.against_reference(of_kl(0.5), of_kl(1))[1:], (None, ""))

    def test_no_common_seed(self):
        self.assertIsNone(table.against_reference(of_kl(0.5), {}))


class Programs(unittest.TestCase):
    def table_of(self, *programs):
        runs = [one for one in matrix.read(QUALITY / "defaults.yaml", "quick").runs if one.model == "small"][:len(programs)]
        results = {one.name: {**METRICS, "program": program} for one, program in zip(runs, programs)}
        return table.markdown(table.rows(results, runs), {"small": 1.0})

    def test_the_table_tells_of_more_than_one_build(self):
        self.assertNotIn("builds", self.table_of("isobath 1 (a)", "isobath 1 (a)"))
        self.assertIn("Made by 2 builds: isobath 1 (a), isobath 1 (b).", self.table_of("isobath 1 (b)", "isobath 1 (a)"))


class Matrix(unittest.TestCase):
    def read(self, name):
        return matrix.read(QUALITY / name, "full").runs

    def test_names_are_unique(self):
        for name in ("defaults.yaml", "peers.yaml", "mixed.yaml", "reestimation.yaml"):
            names = [run.name for run in self.read(name)]
            self.assertEqual(len(names), len(set(names)), name)

    def test_measurement_is_shared_exactly_when_its_keys_agree(self):
        runs = {run.name: run for run in self.read("defaults.yaml")}
        default = runs["small/3-bit/seed-0/default"].measure_name()
        for same in ("small/3-bit/seed-0/exponent 1", "small/2-bit/seed-0/4 sweeps", "small/4-bit/seed-0/qep 1"):
            self.assertEqual(runs[same].measure_name(), default, same)
        for other in ("small/3-bit/seed-1/default", "smollm2/3-bit/seed-0/default", "small/3-bit/seed-0/fisher",
                      "small/3-bit/seed-0/2 row groups"):
            self.assertNotEqual(runs[other].measure_name(), default, other)
        self.assertFalse(runs["small/3-bit/seed-0/D = 1 GPTQ"].needs_measure)

    def test_result_is_made_again_when_a_key_or_the_setting_changes(self):
        run, other = self.read("defaults.yaml")[:2]
        self.assertNotEqual(run.fingerprint({"sequences": 1}), other.fingerprint({"sequences": 1}))
        self.assertNotEqual(run.fingerprint({"sequences": 1}), run.fingerprint({"sequences": 2}))

    def test_scores_are_shared_by_budgets_and_methods(self):
        found = matrix.read(QUALITY / "mixed.yaml", "full")
        names = {run.score_name(found.scores) for run in found.runs if run.model == "small" and run.seed == 0 and run.budget > 0}
        self.assertEqual(len(names), 1)

    def refused(self, configuration, mention):
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write("settings: {full: {seeds: 1}}\nmodels: {a: {}}\ngrids: {g: {}}\n"
                       f"configurations: {{x: {configuration}}}\n")
            file.flush()
            with self.assertRaisesRegex(SystemExit, mention):
                matrix.read(file.name, "full")

    def test_a_budget_needs_scores(self):
        self.refused("{budget: 3}", "no `scores`")

    def test_unknown_key_is_refused(self):
        self.refused("{sett: {}}", "unknown sett")


class Jobs(unittest.TestCase):
    """Runs made at once: every one is made and judged alone, and one that fails stops no other."""

    class Stub(run.Bench):
        def make(self, one, directory):
            if one.configuration == "fisher":
                raise run.Failed("as asked for")
            return {"seconds": 1.0, "bits_per_weight": 3.0}

        def judge(self, made):
            assert len(made) == 1, made
            with self.changing:
                self.record(made, [{**METRICS, "perplexity_original": 1.0}])

    def test_all_but_the_failed_one_are_recorded(self):
        found = matrix.read(QUALITY / "defaults.yaml", "quick")
        wanted = [one for one in found.runs if one.model == "small" and one.grid == "3-bit" and one.seed == 0][:12]
        with tempfile.TemporaryDirectory() as folder:
            options = argparse.Namespace(output=Path(folder), setting="quick", max_minutes=1, jobs=4, keep=False,
                                         matrix=QUALITY / "defaults.yaml")
            bench = self.Stub(options, found)
            failing = [one for one in found.runs if one.name == "small/3-bit/seed-0/fisher"]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self.assertEqual(bench.run_all(wanted + failing), 1)
            self.assertEqual(set(self.Stub(options, found).state["results"]), {one.name for one in wanted})


if __name__ == "__main__":
    unittest.main()
