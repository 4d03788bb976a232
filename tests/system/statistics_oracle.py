"""What `isobath measure` leaves, against an f64 recomputation by transformers autograd: D, sums, α of both equations, H,
scores of widths."""
import pathlib
import subprocess
import sys
import tempfile

import numpy
from isobath_system import DEVICE, ENVIRONMENT, binary, write_safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
SEQUENCES, LENGTH, VOCAB = 6, 40, 256

for model, grouping in (("tiny_llama_a", "index"), ("tiny_llama_b", "index"), ("tiny_llama_b", "cluster"), ("tiny_qwen3", "head")):
    with tempfile.TemporaryDirectory(prefix="isobath-oracle-") as folder:
        folder = pathlib.Path(folder)
        generator = numpy.random.default_rng(5)
        # Two padded sequences, one of them the first: padding must count nowhere.
        write_safetensors(folder / "tokens.safetensors",
                          {"tokens": (generator.integers(0, VOCAB, (SEQUENCES, LENGTH)), "I32"),
                           "lengths": (numpy.array([37, LENGTH, 31, LENGTH, LENGTH, LENGTH]), "I32")},
                          {"format": "pt", "vocab_size": str(VOCAB)})
        (folder / "run.yaml").write_text(f"""
model: {ROOT}/tests/data/{model}
output: {folder}/run
compute_dtype: float32
ranks: {{stages: 2, replicas: 2, threads: 1, device: {DEVICE}}}
calibration: {{tokens: {folder}/tokens.safetensors, sequences: {SEQUENCES}, length: {LENGTH}, logical_shards: 4, microbatch: 2}}
sensitivity: {{per_sequence: exact, row_groups: 2, grouping: {grouping}, covariance: true, probes: 64, gram: {{bits: [2, 4]}}}}
quantization: {{group: 32, clip_search: false, symmetric: {"true" if model == "tiny_llama_a" else "false"}}}
""")
        subprocess.run(["mpirun", "--quiet", "-n", "4", binary(), "measure", str(folder / "run.yaml")], check=True,
                       env=ENVIRONMENT, timeout=120)
        subprocess.run([sys.executable, str(ROOT / "tools/python/compare_statistics.py"), str(ROOT / "tests/data" / model),
                        str(folder / "tokens.safetensors"), str(folder / "run/measure"), "--sequences", str(SEQUENCES),
                        "--length", str(LENGTH)], check=True, timeout=120)
