#!/usr/bin/env python3
"""How much faster two ranks of one thread, and one rank of two threads, are than one of one: measure and quantize, the
layouts in turn, medians.

  bench/rank_scaling.py build/cpu/bin/isobath configs/quickstart.yaml --repeat 3 --set calibration.sequences=32

Run it on an idle machine with two cores. Every run starts anew and writes the same bytes. --layouts "2 replicas,2 stages" takes some
of the layouts beside the one rank.
"""
import statistics

from whole_run import arguments_of, events, run_isobath, scratch

LAYOUTS = {"1 rank": (1, 1, 1), "2 replicas": (1, 2, 1), "2 stages": (2, 1, 1), "2 threads": (1, 1, 2)}


def seconds(output):
    found = {event["event"]: event["seconds"] for event in events(output) if event["event"] in ("measured", "quantized")}
    return found["measured"], found["quantized"]


def main():
    arguments = arguments_of(__doc__, ("--repeat", int, 3), ("--layouts", str, ",".join(LAYOUTS)))
    names = dict.fromkeys(["1 rank", *arguments.layouts.split(",")])
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise SystemExit(f"--layouts: expected some of {', '.join(LAYOUTS)}, found {', '.join(unknown)}")
    chosen = {name: LAYOUTS[name] for name in names}
    times = {name: [] for name in chosen}
    with scratch() as space:
        for turn in range(arguments.repeat):
            for name, (stages, replicas, threads) in chosen.items():
                output = space / f"{name.replace(' ', '-')}-{turn}"
                run_isobath(arguments.isobath, arguments.config, output, stages * replicas,
                            [f"ranks.stages={stages}", f"ranks.replicas={replicas}", f"ranks.threads={threads}",
                             "evaluation.tokens=", *arguments.set], threads=threads)
                times[name].append(seconds(output))
    base = [statistics.median(column) for column in zip(*times["1 rank"])]
    print(f"{'layout':12} {'measure s':>10} {'x':>5} {'quantize s':>11} {'x':>5}   medians of {arguments.repeat}")
    for name, runs in times.items():
        measure, quantize = (statistics.median(column) for column in zip(*runs))
        print(f"{name:12} {measure:10.2f} {base[0] / measure:5.2f} {quantize:11.2f} {base[1] / quantize:5.2f}")


if __name__ == "__main__":
    main()
