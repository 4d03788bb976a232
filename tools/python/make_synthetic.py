#!/usr/bin/env python3
"""Writes a random bf16 checkpoint of any supported architecture and shape, and random token files: for timing and memory, not for quality.

  make_synthetic.py --shape configs/models/llama-3.1-70b/config.json --blocks 2 --vocab 4096 --output models/synthetic
  make_synthetic.py --tokens data/random.safetensors --sequences 16 --length 512 --vocab 4096

Tensors are drawn and written one after the other in pieces, so memory stays small whatever the size of the model. Scales
are those of a fresh model: embedding 0.02, a linear 1/sqrt(fan_in), the two that write to the residual stream
(o_proj, down_proj) another 1/sqrt(2 blocks) smaller, norms 1. The same arguments give the same bytes. Needs numpy only.
"""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np

PIECE_VALUES = 1 << 22  # drawn at once: 16 MiB of f32
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SHARD_BYTES = 4 << 30   # a shard is closed when the next tensor would exceed it


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, help="config.json of a supported architecture")
    parser.add_argument("--output", type=Path, help="model directory to write; must not exist")
    parser.add_argument("--blocks", type=int, default=0, help="transformer blocks; 0: as in the shape")
    parser.add_argument("--vocab", type=int, default=0, help="vocabulary; 0: as in the shape")
    parser.add_argument("--shard-gib", type=float, default=SHARD_BYTES / (1 << 30), help="largest shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=Path, help="token file (.safetensors) to write")
    parser.add_argument("--sequences", type=int, default=16, help="rows of the token file")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    arguments = parser.parse_args()
    if (arguments.shape is None) != (arguments.output is None):
        parser.error("--shape and --output belong together")
    if arguments.shape is None and arguments.tokens is None:
        parser.error("nothing to write: give --shape and --output, or --tokens, or both")
    if arguments.tokens and arguments.tokens.suffix != ".safetensors":
        parser.error(f"--tokens {arguments.tokens}: expected a .safetensors file")
    if arguments.tokens and arguments.shape is None and arguments.vocab <= 0:
        parser.error("--tokens alone needs --vocab, which the ids stay below")
    if min(arguments.blocks, arguments.vocab) < 0 or arguments.sequences < 1 or arguments.length < 2:
        parser.error("--blocks and --vocab must not be negative, --sequences at least 1, --length at least 2")
    return arguments


def read_shape(arguments):
    config = json.loads(arguments.shape.read_text(encoding="utf-8"))
    if (config.get("architectures") or [None])[0] not in ARCHITECTURES:
        raise SystemExit(f"make_synthetic.py: {arguments.shape}: expected architectures [NAME] of {', '.join(ARCHITECTURES)}, "
                         f"found {config.get('architectures')}")
    config["num_hidden_layers"] = arguments.blocks or config["num_hidden_layers"]
    config["vocab_size"] = arguments.vocab or config["vocab_size"]
    # Special tokens of a larger vocabulary would be out of range.
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        if isinstance(value, list) or (isinstance(value, int) and value >= config["vocab_size"]):
            config[key] = None
    config["torch_dtype"] = "bfloat16"
    config.pop("dtype", None)
    return config


def tensors_of(config):
    """(name, shape, standard deviation) of every tensor; deviation None: a vector of ones, 0: of zeros."""
    d, f, blocks = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    d_query, d_key = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    architecture = config["architectures"][0]
    residual = 1 / math.sqrt(2 * blocks)
    yield "model.embed_tokens.weight", (config["vocab_size"], d), 0.02
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        yield prefix + "input_layernorm.weight", (d,), None
        yield prefix + "post_attention_layernorm.weight", (d,), None
        if architecture == "Qwen3ForCausalLM":
            yield prefix + "self_attn.q_norm.weight", (head_dim,), None
            yield prefix + "self_attn.k_norm.weight", (head_dim,), None
        for part, name, rows, columns, scale in (
                ("self_attn", "q_proj", d_query, d, 1.0), ("self_attn", "k_proj", d_key, d, 1.0),
                ("self_attn", "v_proj", d_key, d, 1.0), ("self_attn", "o_proj", d, d_query, residual),
                ("mlp", "gate_proj", f, d, 1.0), ("mlp", "up_proj", f, d, 1.0), ("mlp", "down_proj", d, f, residual)):
            yield f"{prefix}{part}.{name}.weight", (rows, columns), scale / math.sqrt(columns)
            if has_bias(config, name):
                yield f"{prefix}{part}.{name}.bias", (rows,), 0.0
    yield "model.norm.weight", (d,), None
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], d), 1 / math.sqrt(d)


def has_bias(config, name):
    """As include/isobath/model/model_config.hpp reads it."""
    architecture = config["architectures"][0]
    if name in ("gate_proj", "up_proj", "down_proj"):
        return architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias"))
    if architecture == "Qwen2ForCausalLM":
        return name != "o_proj"
    return architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") and bool(config.get("attention_bias"))


def to_bf16(values):
    """f32 to bf16, rounded to nearest even, as 16-bit integers."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")


def write_tensor(file, shape, deviation, generator):
    left = math.prod(shape)
    while left > 0:
        n = min(left, PIECE_VALUES)
        if deviation:
            values = generator.standard_normal(n, dtype=np.float32) * np.float32(deviation)
        else:
            values = np.full(n, 1.0 if deviation is None else 0.0, np.float32)
        file.write(to_bf16(values).tobytes())
        left -= n


def header_bytes(entries, metadata):
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    return len(text + b" " * (-len(text) % 8)).to_bytes(8, "little") + text + b" " * (-len(text) % 8)


def plan_shards(tensors, limit):
    shards, used = [[]], 0
    for tensor in tensors:
        n_bytes = 2 * math.prod(tensor[1])
        if shards[-1] and used + n_bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += n_bytes
    return shards


def write_model(arguments, config):
    if arguments.output.exists():
        raise SystemExit(f"make_synthetic.py: {arguments.output} exists; name a new directory")
    # A half-written model must not look like one.
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    partial.mkdir(parents=True)
    tensors = list(tensors_of(config))
    shards = plan_shards(tensors, arguments.shard_gib * (1 << 30))
    weight_map, total, number = {}, 0, 0
    for index, shard in enumerate(shards, 1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        entries, offset = {}, 0
        for tensor, shape, _ in shard:
            end = offset + 2 * math.prod(shape)
            entries[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            weight_map[tensor], offset = name, end
        total += offset
        with open(partial / name, "wb") as file:
            file.write(header_bytes(entries, {"format": "pt"}))
            for _, shape, deviation in shard:
                write_tensor(file, shape, deviation, np.random.default_rng([arguments.seed, number]))
                number += 1
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.rename(arguments.output)
    print(f"{arguments.output}: {len(tensors)} tensors, {total / 1e9:.2f} GB in {len(shards)} shard{'s' if len(shards) > 1 else ''}")


def write_tokens(arguments, vocabulary):
    rows = np.random.default_rng([arguments.seed, 1 << 30]).integers(
        0, vocabulary, (arguments.sequences, arguments.length), dtype=np.int32)
    lengths = np.full(arguments.sequences, arguments.length, np.int32)
    entries, offset = {}, 0
    for name, array in (("tokens", rows), ("lengths", lengths)):
        entries[name] = {"dtype": "I32", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    metadata = {"vocab_size": str(vocabulary), "bos_policy": "none", "sources": json.dumps([{"name": "random"}])}
    arguments.tokens.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.tokens.with_name(arguments.tokens.name + ".tmp")
    temporary.write_bytes(header_bytes(entries, metadata) + rows.tobytes() + lengths.tobytes())
    temporary.rename(arguments.tokens)
    print(f"{arguments.tokens}: {arguments.sequences} sequences of {arguments.length} random tokens below {vocabulary}")


def main():
    arguments = parse_arguments()
    config = read_shape(arguments) if arguments.shape else {}
    if arguments.output:
        write_model(arguments, config)
    if arguments.tokens:
        write_tokens(arguments, config.get("vocab_size") or arguments.vocab)


if __name__ == "__main__":
    main()
