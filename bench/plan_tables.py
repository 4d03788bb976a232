#!/usr/bin/env python3
"""The tables of docs/performance.md on Llama-3.1-70B and 405B: what `isobath plan` says of them, for the defaults and for
plain D-weighted GPTQ. Predictions; nothing is run, and no weights are needed.

  bench/plan_tables.py build/cpu/bin/isobath
"""
import argparse
import json
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = [("70B", "llama-3.1-70b", "h100-node"), ("70B", "llama-3.1-70b", "h100-4-nodes"),
         ("405B", "llama-3.1-405b", "h100-4-nodes"), ("405B", "llama-3.1-405b", "h100-16-nodes")]
PLAIN = ("quantization.asymmetric.correction=none", "quantization.refinement.sweeps=0", "sensitivity.shrinkage=0")
STEPS = ("codes of the rows", "factorization", "covariance", "reduction of H", "objective before and after")


def plan(isobath, model, cluster, settings):
    with tempfile.TemporaryDirectory() as space:
        output = pathlib.Path(space) / "plan.json"
        line = [isobath, "plan", f"configs/{model}.yaml", "--cluster", f"configs/clusters/{cluster}.yaml", "--model-config",
                f"configs/models/{model}/config.json", "--json", str(output)]
        for setting in settings:
            line += ["--set", setting]
        subprocess.run(line, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def gib(size):
    return f"{size / 2 ** 30:.1f} GiB"


def tuning(isobath, model, cluster, settings):
    """Time of three epochs, and the largest device of a run with them."""
    try:
        found = plan(isobath, model, cluster, (*settings, "quantization.tuning.epochs=3"))
    except subprocess.CalledProcessError:
        return "does not fit"
    return f"{duration(found['tune']['seconds'])}, {gib(found['device_bytes'])}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("isobath", type=lambda text: str(pathlib.Path(text).absolute()))
    isobath = parser.parse_args().isobath
    columns = ["model", "nodes (ranks)", "grid", "load", "measure", "quantize, D measured once", "D again every 8 blocks",
               "D again every block", "scales tuned, 3 epochs: time, largest device", "evaluate", "largest device without",
               "largest node"]
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    plain = []
    for kind, settings in (("", ()), (", plain", PLAIN)):
        for name, model, cluster in CASES:
            found = plan(isobath, model, cluster, settings)
            if kind:
                plain.append((name, found))
            quantize = {one["reestimate"]: one["seconds"] for one in found["quantize"]}
            print(f"| {name}{kind} | {found['nodes']} ({found['ranks']}) | {found['stages']} × {found['replicas']} | "
                  f"{duration(found['load']['seconds'])} | {duration(found['measure']['seconds'])} | " +
                  " | ".join(duration(quantize[policy]) for policy in sorted(quantize, key=quantize.get)) +
                  f" | {tuning(isobath, model, cluster, settings)} | {duration(found['evaluate']['seconds'])} | "
                  f"{gib(found['device_bytes'])} | {gib(found['node_bytes'])} |")
    print("\n| step of quantize (never again), plain | " + " | ".join(f"{name}, {found['ranks']} ranks" for name, found in plain) +
          " |\n" + "| --- " * (1 + len(plain)) + "|")
    steps = [found["quantize"][0] for _, found in plain]
    for step in STEPS:
        print(f"| {step} | " + " | ".join(duration(one["steps"][step]) for one in steps) + " |")
    print("| everything else | " +
          " | ".join(duration(one["seconds"] - sum(one["steps"][step] for step in STEPS)) for one in steps) + " |")


if __name__ == "__main__":
    main()
