#!/usr/bin/env python3
"""Time and memory of isobath and of other quantizers on the same work: model, tokens, bits, grid, threads, machine.

  bench/peers/compare.py MODEL TOKENS --output runs/compare [--bits 4 3] [--repeats 3] [--systems …] [--dtype float32]

Every run is cold and end to end, from the start of the process to the checkpoint on disk; nothing is evaluated,
nothing measured before is reused. All systems run once in turn before any runs again, so that a machine that slows
down slows all of them. Seconds of isobath are those of the whole command, mpirun included; those of a peer end when
its own checkpoint is written (peer.py). Memory is the peak resident memory of all processes of the command added
up, in which isobath's ranks each count.

Each run is stored at once in compare.json of the output and not made again: the comparison may be run piecewise,
and only what is new is added by other --systems, --bits or --repeats. A system that fails is told and left out.
compare.md holds the table. Leave the machine alone meanwhile. As root, first `source launch/setup.sh &&
isobath_environment` for Open MPI's settings.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.2


class Failed(Exception):
    pass


# What peers do not do either: no correction for the quantized prefix, no refinement of the codes.
PLAIN = {"refinement": {"sweeps": 0}, "asymmetric": {"correction": "none"}}


def isobath(ranks, threads, weighting, residency="resident", solver=PLAIN, stages=1):
    return {"ranks": ranks, "threads": threads, "weighting": weighting, "residency": residency, "solver": solver,
            "stages": stages}


def peer(environment, script, *options):
    return {"environment": environment, "script": script, "options": list(options)}


SYSTEMS = {
    "isobath D = 1, 2 ranks of 1 thread": isobath(2, 1, "none"),
    "isobath D = 1, 1 rank of 2 threads": isobath(1, 2, "none"),
    "isobath D = 1, 1 rank of 2 threads, streamed": isobath(1, 2, "none", "streamed"),
    "isobath with sensitivity, 2 ranks of 1 thread": isobath(2, 1, "sensitivity"),
    "isobath with sensitivity, 2 stages of 1 thread": isobath(2, 1, "sensitivity", stages=2),
    "isobath with sensitivity, 1 rank of 2 threads": isobath(1, 2, "sensitivity"),
    "isobath, the defaults, 2 ranks of 1 thread": isobath(2, 1, "sensitivity", solver={}),
    "llm-compressor GPTQ": peer("llmcompressor", "peer_llmcompressor.py"),
    "llm-compressor AWQ": peer("llmcompressor", "peer_llmcompressor.py", "--method", "awq"),
    "GPTQModel GPTQ": peer("gptqmodel", "peer_gptqmodel.py"),
    "GPTQModel GPTAQ": peer("gptqmodel", "peer_gptqmodel.py", "--gptaq"),
    "AutoRound": peer("autoround", "peer_autoround.py"),
}
DEFAULT_SYSTEMS = [name for name in SYSTEMS if name.startswith("isobath") or name.endswith(" GPTQ")]
BASELINES = {"D = 1": "isobath D = 1, 2 ranks of 1 thread", "sensitivity": "isobath with sensitivity, 2 ranks of 1 thread"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens", help="token file (safetensors)")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--systems", "--peers", nargs="+", default=DEFAULT_SYSTEMS, choices=list(SYSTEMS), metavar="NAME",
                        help="; ".join(SYSTEMS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32",
                        help="in which peers compute: the faster of the two on the machine")
    parser.add_argument("--keep", action="store_true", help="keeps a checkpoint of each system, in checkpoints/ of the output")
    parser.add_argument("--isobath", type=Path, default=ROOT / "build/cpu/bin/isobath")
    return parser.parse_args()


class Memory(threading.Thread):
    """Watches the peak resident memory of a process and all its descendants until it is stopped."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.peaks, self.ended = pid, {}, threading.Event()

    def run(self):
        while not self.ended.wait(POLL_S):
            for pid in descendants(self.pid):
                self.peaks[pid] = max(self.peaks.get(pid, 0), high_water_kib(pid))

    def stop(self):
        self.ended.set()
        self.join()
        return sum(self.peaks.values()) * 1024 / 1e9, max(self.peaks.values(), default=0) * 1024 / 1e9


def descendants(pid):
    found, index = [pid], 0
    while index < len(found):
        try:
            for task in Path(f"/proc/{found[index]}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # ended meanwhile
            pass
        index += 1
    return found


def high_water_kib(pid):
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def command_of(system, options, bits, checkpoint):
    if "script" in system:
        python = ROOT / ".cache/peers" / system["environment"] / "bin/python"
        if not python.exists():
            raise Failed(f"no {python}; run bench/peers/setup.sh {system['environment']}")
        return [python, ROOT / "bench/peers" / system["script"], options.model, options.tokens, checkpoint, "--bits", bits,
                "--group", options.group, "--sequences", options.sequences, "--length", options.length, "--threads", 2,
                "--dtype", options.dtype, *system["options"]]
    config = checkpoint.with_suffix(".yaml")
    config.write_text(json.dumps({
        "model": options.model, "output": str(checkpoint), "residency": system["residency"],
        "ranks": {"threads": system["threads"], "stages": system["stages"], "replicas": system["ranks"] // system["stages"]},
        "calibration": {"tokens": options.tokens, "sequences": options.sequences, "length": options.length},
        "sensitivity": {"per_sequence": "off"},
        "quantization": {"bits": bits, "group": options.group, "symmetric": True, "weighting": system["weighting"], **system["solver"]}}),
        encoding="utf-8")
    launcher = ["mpirun", "-n", system["ranks"]] if system["ranks"] > 1 else []
    return [*launcher, options.isobath, "run", config]


def run_once(name, options, bits, repeat):
    checkpoint = options.output / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    title = f"{name}, {bits} bits".replace(" ", "-")
    log = options.output / "logs" / f"{title},-{repeat}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(part) for part in command_of(SYSTEMS[name], options, bits, checkpoint)]
    with log.open("w", encoding="utf-8") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        memory = Memory(process.pid)
        memory.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        peak_gb, largest_gb = memory.stop()
    text = log.read_text(encoding="utf-8")
    if code != 0:
        end = "\n".join(text.rstrip().split("\n")[-8:])
        raise Failed(f"{name}, {bits} bits: exit code {code}; the end of {log}:\n{end}")
    found = {"seconds": seconds, "peak_gb": peak_gb, "largest_gb": largest_gb, "load_before": os.getloadavg()[0]}
    if "script" in SYSTEMS[name]:
        report = json.loads([line for line in text.split("\n") if line.startswith('{"peer"')][-1])
        # Its memory is taken when its work is done; what the process does afterwards is our decoding.
        found |= {"seconds": report["total_s"], "peak_gb": report["peak_gb"], "largest_gb": report["peak_gb"],
                  "report": report}
    if options.keep:
        kept = options.output / "checkpoints" / title
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        checkpoint.rename(kept)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return found


def markdown(state, options):
    runs, lines = state["runs"], []

    def values(name, bits, key):
        keys = [f"{name}|{bits}|{repeat}" for repeat in range(options.repeats)]
        return [runs[one][key] for one in keys if one in runs]

    for bits in options.bits:
        if not any(values(name, bits, "seconds") for name in SYSTEMS):
            continue
        lines += ["| bits | system | runs | seconds, median (least to most) | " +
                  " | ".join(f"/ isobath {title}" for title in BASELINES) + " | peak memory, GB |",
                  "| --- " * (5 + len(BASELINES)) + "|"]
        for name in SYSTEMS:
            seconds = values(name, bits, "seconds")
            if not seconds:
                continue
            ratios = []
            for baseline in BASELINES.values():
                reference = values(baseline, bits, "seconds")
                ratios.append(f"{median(seconds) / median(reference):.2f}" if reference else "")
            lines.append(f"| {bits} | {name} | {len(seconds)} | {median(seconds):.1f} "
                         f"({min(seconds):.1f} to {max(seconds):.1f}) | " + " | ".join(ratios) +
                         f" | {median(values(name, bits, 'peak_gb')):.2f} |")
        lines.append("")
    versions = {}
    for one in runs.values():
        versions |= {one["report"]["peer"]: one["report"]["versions"]} if "report" in one else {}
    lines += [f"{options.sequences} × {options.length} tokens, group {options.group}, symmetric, 2 threads in all; "
              f"peers compute in {options.dtype}. {state['machine']}. {state['isobath']}."]
    for name, found in sorted(versions.items()):
        lines.append(f"{name}: {', '.join(f'{package} {number}' for package, number in found.items())}.")
    return "\n".join(lines) + "\n"


def describe_machine():
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    return f"{len(models)} × {models[0] if models else platform.processor()}"


def main():
    options = parse_arguments()
    options.output = options.output.absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    options.model, options.tokens = str(Path(options.model).absolute()), str(Path(options.tokens).absolute())
    work = {"model": options.model, "tokens": options.tokens, "group": options.group, "sequences": options.sequences,
            "length": options.length, "dtype": options.dtype}
    store = options.output / "compare.json"
    state = json.loads(store.read_text()) if store.exists() else {"work": work, "runs": {}}
    if state["work"] != work:
        raise SystemExit(f"{store} holds runs of other work: {state['work']}; name another --output")
    state["machine"] = describe_machine()
    version = subprocess.run([options.isobath, "version"], capture_output=True, text=True, check=True).stdout
    state["isobath"] = version.split("\n", 1)[0].strip()
    failed = set()
    for repeat in range(options.repeats):
        for bits in options.bits:
            for name in options.systems:
                key = f"{name}|{bits}|{repeat}"
                if key not in state["runs"] and (name, bits) not in failed:
                    try:
                        state["runs"][key] = run_once(name, options, bits, repeat)
                    except Failed as problem:
                        print(problem, file=sys.stderr, flush=True)
                        failed.add((name, bits))
                        continue
                    print(f"{name}, {bits} bits, run {repeat + 1}: {state['runs'][key]['seconds']:.1f} s, "
                          f"{state['runs'][key]['peak_gb']:.2f} GB", flush=True)
                    temporary = store.with_suffix(".tmp")
                    temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
                    temporary.rename(store)
    table = markdown(state, options)
    (options.output / "compare.md").write_text(table, encoding="utf-8")
    print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
