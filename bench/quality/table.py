"""From results of single runs to one table: mean and spread over the seeds, and each configuration beside the reference."""
import math
from statistics import mean, median, stdev

from matrix import REFERENCE

COLUMNS = (("perplexity", "perplexity", 3), ("kl_mean", "KL mean", 4), ("kl_median", "KL median", 4), ("kl_p99", "KL 99 %", 3),
           ("top1_agreement", "top-1", 4), ("bits_per_weight", "bits/weight", 3), ("seconds", "seconds", 1))


def spread(values):
    return stdev(values) if len(values) > 1 else None


def against_reference(results, reference):
    """Ratio of mean KL to the reference's of the same seed, as (ratio, standard deviation, verdict), or None.

    The mean is geometric. A configuration counts as better or worse where every seed says so and the mean of the
    logarithms is larger than their standard deviation; with one seed nothing is said.
    """
    logs = [math.log(results[seed]["kl_mean"] / reference[seed]["kl_mean"])
            for seed in sorted(set(results) & set(reference))
            if results[seed]["kl_mean"] > 0 and reference[seed]["kl_mean"] > 0]
    if not logs:
        return None
    average, deviation = mean(logs), spread(logs)
    verdict = ""
    if deviation is not None:
        decided = abs(average) > deviation and (max(logs) < 0 or min(logs) > 0)
        verdict = ("better" if average < 0 else "worse") if decided else "within spread"
    return math.exp(average), deviation, verdict


def cell(values, digits):
    deviation = spread(values)
    if max(abs(value) for value in values) >= 1e5:
        return f"{median(values):.2e}"
    return f"{mean(values):.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def rows(results, runs):
    """results: run name -> metrics. One row a model, grid and configuration, in the order of the matrix."""
    by_row = {}
    for run in runs:
        if run.name in results:
            by_row.setdefault((run.model, run.grid, run.configuration), {})[run.seed] = results[run.name]
    found = []
    for (model, grid, configuration), seeds in by_row.items():
        row = {"model": model, "grid": grid, "configuration": configuration, "seeds": len(seeds)}
        row["programs"] = sorted({seed["program"] for seed in seeds.values() if "program" in seed})
        for key, _, _ in COLUMNS:
            values = [seeds[seed][key] for seed in sorted(seeds)]
            row[key] = {"mean": mean(values), "spread": spread(values), "values": values}
        reference = by_row.get((model, grid, REFERENCE), {})
        compared = against_reference(seeds, reference)
        if compared and configuration != REFERENCE:
            row["kl_ratio"] = {"mean": compared[0], "spread": compared[1], "verdict": compared[2]}
        found.append(row)
    return found


def markdown(found, originals):
    lines = []
    for model, grid in dict.fromkeys((row["model"], row["grid"]) for row in found):
        lines += [f"### {model}, {grid}", "", f"Original: perplexity {originals[model]:.3f}.", "",
                  "| configuration | seeds | " + " | ".join(title for _, title, _ in COLUMNS) + f" | KL / {REFERENCE} | |",
                  "| --- " * (len(COLUMNS) + 4) + "|"]
        for row in found:
            if (row["model"], row["grid"]) == (model, grid):
                cells = [cell(row[key]["values"], digits) for key, _, digits in COLUMNS]
                ratio = row.get("kl_ratio")
                compared = "" if not ratio else f"{ratio['mean']:.3f}" + (
                    "" if ratio["spread"] is None else f" ± {ratio['mean'] * ratio['spread']:.3f}")
                lines.append(f"| {row['configuration']} | {row['seeds']} | " + " | ".join(cells) +
                             f" | {compared} | {ratio['verdict'] if ratio else ''} |")
        lines.append("")
    programs = sorted({program for row in found for program in row["programs"]})
    if len(programs) > 1:
        lines += [f"Made by {len(programs)} builds: {', '.join(programs)}.", ""]
    return "\n".join(lines)
