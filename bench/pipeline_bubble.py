#!/usr/bin/env python3
"""Share of a measure pass in which the stages of a pipeline wait, beside (S - 1) / (M + S - 1) of one forward, one backward.

  bench/pipeline_bubble.py build/cpu/bin/isobath configs/quickstart.yaml --stages 2

Read from the timeline of one run (--trace): time in forward and backward spans without the waits inside them is work, the rest
between the first forward pass and the last backward pass of all ranks is idle. M counts the microbatches between two drains.
"""
import json
import re

from whole_run import arguments_of, run_isobath, scratch


def main():
    arguments = arguments_of(__doc__, ("--stages", int, 2))
    with scratch() as space:
        text = run_isobath(arguments.isobath, arguments.config, space / "run", arguments.stages,
                           [f"ranks.stages={arguments.stages}", "ranks.replicas=1", "ranks.threads=1", *arguments.set],
                           command="measure", more=("--trace", str(space / "trace.json")))
        spans = [event for event in json.loads((space / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    work, begin, end, microbatches = {}, float("inf"), 0.0, set()
    for span in spans:
        if span["name"] in ("forward", "backward"):
            begin, end = min(begin, span["ts"]), max(end, span["ts"] + span["dur"])
            work[span["pid"]] = work.get(span["pid"], 0.0) + span["dur"]
            microbatches.add(span["args"]["number"])
        elif span["name"] == "wait for a neighbour":
            work[span["pid"]] = work.get(span["pid"], 0.0) - span["dur"]
    n_segments = int(re.search(r"segment \d+/(\d+)", text).group(1))
    in_segment = len(microbatches) / n_segments
    expected = (arguments.stages - 1) / (in_segment + arguments.stages - 1)
    total = end - begin
    for rank in sorted(work):
        print(f"stage {rank}: works {work[rank] / 1e6:.2f} of {total / 1e6:.2f} s, waits {1 - work[rank] / total:.1%}")
    slowest = max(work.values())
    print(f"bubble (the busiest stage's wait) {1 - slowest / total:.1%}, (S-1)/(M+S-1) = {expected:.1%} with M = {in_segment:g} "
          f"in {n_segments} segments; imbalance of the stages {1 - sum(work.values()) / len(work) / slowest:.1%}")


if __name__ == "__main__":
    main()
