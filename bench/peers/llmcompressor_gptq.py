#!/usr/bin/env python3
"""GPTQ by llm-compressor on isobath's own token file: same model, same tokens, same grid, for comparison.

Usage: llmcompressor_gptq.py MODEL CALIBRATION.safetensors OUTPUT --bits 3 --group 64 [--asymmetric] [--threads 2]

Needs `pip install llmcompressor` in an environment of its own. Prints one JSON object: versions, seconds of the
quantization and of everything after the imports, peak resident memory. The checkpoint in OUTPUT is judged by
`isobath evaluate CONFIG --checkpoint OUTPUT`.
"""
import argparse
import json
import resource
import time
from importlib.metadata import version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("output")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    ids = load_file(arguments.tokens)["tokens"].tolist()
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    scheme = {"targets": ["Linear"],
              "weights": {"num_bits": arguments.bits, "type": "int", "symmetric": not arguments.asymmetric,
                          "strategy": "group", "group_size": arguments.group}}
    begin = time.perf_counter()
    oneshot(model=model, dataset=dataset, processor=tokenizer, max_seq_length=len(ids[0]),
            num_calibration_samples=len(ids),
            recipe=GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme}))
    quantize_s = time.perf_counter() - begin
    model.save_pretrained(arguments.output, save_compressed=True)
    tokenizer.save_pretrained(arguments.output)
    print(json.dumps({"peer": "llm-compressor GPTQ", "llmcompressor": version("llmcompressor"),
                      "torch": version("torch"), "bits": arguments.bits, "group": arguments.group,
                      "symmetric": not arguments.asymmetric, "threads": arguments.threads,
                      "quantize_s": round(quantize_s, 1), "total_s": round(time.perf_counter() - start, 1),
                      "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)}))


if __name__ == "__main__":
    main()
