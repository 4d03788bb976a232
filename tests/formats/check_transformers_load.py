"""Checkpoints written by quantize_probe must load in transformers + compressed-tensors with the bits we computed.

Usage: check_transformers_load.py QUANTIZE_PROBE
"""

import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

# bits, group (0: channel), symmetric, bits of down_proj
CASES = [(bits, group, "sym", bits) for bits in (2, 3, 4, 5, 6, 8) for group in (16, 32, 0)]
CASES += [(4, 32, "sym", 8), (3, 16, "sym", 5)]
CASES += [(bits, group, "asym", bits) for bits in (2, 3, 4, 8) for group in (16, 0)]


def weight_of(module):
    """The dense weight a forward pass uses, decompressing if that has not happened yet."""
    if getattr(module, "weight", None) is None or not module.weight.dtype.is_floating_point:
        from compressed_tensors.compressors import decompress_module

        decompress_module(module)
    return module.weight.detach()


def check(probe, source, target, bits, group, sign, bits_of_down):
    subprocess.run([probe, source, target, str(bits), str(group), sign, str(bits_of_down)], check=True)
    options = {} if sign == "sym" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16, **options)
    with torch.no_grad():
        logits = model(torch.arange(16).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()
    modules = dict(model.named_modules())
    expected = load_file(os.path.join(target, "dequantized.safetensors"))
    assert len(expected) == 14
    for name, weight in expected.items():
        loaded = weight_of(modules[name.removesuffix(".weight")])
        assert loaded.dtype == weight.dtype, (name, loaded.dtype)
        assert torch.equal(loaded, weight), f"{name}: {(loaded != weight).sum()} of {weight.numel()} differ"


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "source")
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        for index, case in enumerate(CASES):
            try:
                check(sys.argv[1], source, os.path.join(folder, str(index)), *case)
                print("ok  ", *case)
            except Exception as error:  # every case is reported before the script fails
                failures += 1
                print("FAIL", *case, repr(error)[:500])
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
