#!/usr/bin/env python3
"""A model several times larger than the memory used: measured, quantized and evaluated with streamed weights on one rank,
and, with --compare, with resident ones, whose files must be the same.

  bench/streamed.py build/cpu/bin/isobath --blocks 96 --compare

Writes a synthetic Llama (tools/python/make_synthetic.py) into a scratch directory first, ISOBATH_BENCH_DIR or the system's.
Peak memory is that of the process, as the kernel counts it.
"""
import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

from whole_run import scratch

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools/python/make_synthetic.py"
PUBLISHED = ROOT / "configs/models/llama-3.1-8b/config.json"  # whose keys are kept
HEAD_DIM, HEADS_A_KEY = 64, 4


def digests(output):
    files = [path for folder in ("model", "measure") for path in sorted((output / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in [*files, output / "modules.json", output / "evaluation.json"]}


def run(isobath, config, output, settings):
    """Seconds and peak bytes of one rank."""
    line = [isobath, "run", str(config), "--set", f"output={output}"]
    for setting in settings:
        line += ["--set", setting]
    began = time.monotonic()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"status {status}: {' '.join(line)}")
    return time.monotonic() - began, 1024 * usage.ru_maxrss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("isobath")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--d-ff", type=int, default=2816)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compare", action="store_true", help="also with resident weights")
    parser.add_argument("--set", action="append", default=[], help="key=value, as of isobath")
    arguments = parser.parse_args()
    with scratch() as space:
        heads = arguments.d_model // HEAD_DIM
        shape = json.loads(PUBLISHED.read_text()) | {
            "hidden_size": arguments.d_model, "intermediate_size": arguments.d_ff, "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // HEADS_A_KEY), "head_dim": HEAD_DIM}
        (space / "config.json").write_text(json.dumps(shape))
        subprocess.run([sys.executable, str(TOOL), "--shape", str(space / "config.json"), "--blocks", str(arguments.blocks),
                        "--vocab", str(arguments.vocab), "--output", str(space / "model"), "--tokens", str(space / "tokens.safetensors"),
                        "--sequences", str(arguments.sequences), "--length", str(arguments.length)], check=True)
        model_bytes = sum(path.stat().st_size for path in (space / "model").glob("*.safetensors"))
        config = space / "run.yaml"
        config.write_text(json.dumps({
            "model": str(space / "model"), "output": str(space / "run"), "ranks": {"threads": arguments.threads},
            "scratch": {"directory": str(space / "scratch"), "memory_gib": 0},
            "calibration": {"tokens": str(space / "tokens.safetensors"), "sequences": arguments.sequences,
                            "length": arguments.length, "logical_shards": min(4, arguments.sequences)},
            "evaluation": {"tokens": str(space / "tokens.safetensors"), "window": arguments.length, "windows": 2}}))
        found = {}
        for residency in ("streamed", "resident")[: 2 if arguments.compare else 1]:
            seconds, peak = run(arguments.isobath, config, space / residency, [f"residency={residency}", *arguments.set])
            found[residency] = digests(space / residency)
            print(f"{residency}: {seconds:.1f} s, peak memory {peak / 2**30:.2f} GiB; checkpoint {model_bytes / 2**30:.2f} GiB, "
                  f"{model_bytes / peak:.2f} x the peak", flush=True)
        if arguments.compare:
            different = [name for name in found["streamed"] if found["streamed"][name] != found["resident"].get(name)]
            print(f"{len(found['streamed'])} files, " + (f"different: {different}" if different else "all the same"))
            sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
