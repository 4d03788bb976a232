#!/usr/bin/env python3
"""Share of the quantize pass that saving its state took, from the events of finished runs.

  bench/checkpoint_overhead.py runs/smollm2-w3 …
"""
import sys

from whole_run import events

for run in sys.argv[1:] or [sys.exit(__doc__)]:
    found = events(run)
    saved = [event["seconds"] for event in found if event["event"] == "checkpoint"]
    total = sum(event["seconds"] for event in found if event["event"] == "quantized")
    print(f"{run}: {len(saved)} states saved in {sum(saved):.2f} s of {total:.2f} s: {sum(saved) / total:.1%}"
          if total else f"{run}: quantize is not finished")
