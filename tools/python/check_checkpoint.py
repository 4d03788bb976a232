"""Loads a quantized checkpoint with transformers and compares it with what isobath says of it.

  check_checkpoint.py runs/NAME/model --tokens data/test.safetensors --evaluation runs/NAME/evaluation.json

Every quantized weight must equal, bit for bit, an independent decoding of the packed words; with --tokens the perplexity on
the evaluation's windows must agree with evaluation.json within 0.3 %. Exits 1 otherwise. Needs torch, transformers and
compressed-tensors (launch/setup.sh test).
"""
import argparse
import json
import math
import pathlib

import numpy
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

# Both sides compute in bf16 with different kernels; a wrong weight or scale moves perplexity by far more.
PERPLEXITY_TOLERANCE = 0.003


def unpack(words, bits, columns):
    """Dense little-endian bit stream of each row (compressed-tensors >= 0.18) -> signed codes [rows, columns]."""
    stream = numpy.unpackbits(words.view(numpy.uint8).reshape(words.shape[0], -1), axis=1, bitorder="little")
    fields = stream[:, : columns * bits].reshape(words.shape[0], columns, bits)
    return (fields.astype(numpy.int64) << numpy.arange(bits)).sum(axis=2) - (1 << (bits - 1))


def packed_modules(directory):
    """module -> codes less their zero points [rows, groups, columns of a group] f32, scales [rows, groups] as stored."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: safe_open(directory / name, "pt") for name in set(index.values())}

    def read(name):
        return files[index[name]].get_tensor(name)

    for name in sorted(index):
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        words, scale = read(name).numpy(), read(module + ".weight_scale")
        rows, columns = read(module + ".weight_shape").tolist()
        bits = max(b for b in range(2, 9) if (columns * b + 31) // 32 <= words.shape[1])
        levels = torch.from_numpy(unpack(words, bits, columns)).view(rows, scale.shape[1], -1)
        if module + ".weight_zero_point" in index:  # packed along the rows
            zeros = numpy.ascontiguousarray(read(module + ".weight_zero_point").numpy().T)
            levels = levels - torch.from_numpy(unpack(zeros, bits, rows).T).unsqueeze(-1)
        yield module, levels.float(), scale


def decoded_weights(directory):
    """module -> [rows, columns] weight in the scale's dtype, for every packed module of the checkpoint."""
    for module, levels, scale in packed_modules(directory):
        yield module, (levels * scale.float().unsqueeze(-1)).to(scale.dtype).flatten(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--tokens", help="token file of the evaluation")
    parser.add_argument("--evaluation", type=pathlib.Path, help="evaluation.json to compare with")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(torch.zeros((1, 8), dtype=torch.long))  # compressed-tensors decompresses in the first forward
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    n_modules = n_different = 0
    for module, weight in decoded_weights(arguments.checkpoint):
        n_modules += 1
        n_different += not torch.equal(linears[module].weight.data, weight)
    print(f"{n_modules} quantized modules, {n_different} differ from an independent decoding")
    failed = n_different > 0 or n_modules == 0

    if arguments.tokens:
        options = json.loads(arguments.evaluation.read_text()) if arguments.evaluation else {}
        tokens = safe_open(arguments.tokens, "pt").get_tensor("tokens").long()
        tokens = tokens[: options.get("windows", len(tokens)), : options.get("window", tokens.shape[1])]
        total = count = 0
        with torch.no_grad():
            for row in tokens:
                logits = model(row[None]).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
                count += len(row) - 1
        perplexity = math.exp(total / count)
        print(f"perplexity in transformers {perplexity:.4f} on {count} tokens", end="")
        if options:
            difference = perplexity / options["perplexity"] - 1
            print(f", isobath {options['perplexity']:.4f}: {100 * difference:+.3f} %", end="")
            failed = failed or abs(difference) > PERPLEXITY_TOLERANCE
        print()
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
