#!/usr/bin/env python3
"""GPTQ, or its GPTAQ mode, by GPTQModel on isobath's own token file: same model, same tokens, same bits and group.

  .cache/peers/gptqmodel/bin/python bench/peers/peer_gptqmodel.py MODEL TOKENS OUTPUT --bits 3 --group 64 [--gptaq]

bench/peers/setup.sh gptqmodel makes that Python. GPTQModel's own checkpoint goes to OUTPUT-gptq; when it is on disk
the times are taken, then GPTQModel reads it back, dequantizes it, and OUTPUT holds these weights in bf16. Prints
one JSON line: versions, seconds, peak resident memory.
"""
import os
import shutil
import tempfile

import peer


def quantize_config(options):
    from gptqmodel.quantization.config import GPTAQConfig, GPTQConfig
    grid = {"bits": options.bits, "group_size": options.group, "sym": not options.asymmetric, "desc_act": False}
    return GPTQConfig(**grid, gptaq=GPTAQConfig()) if options.gptaq else GPTQConfig(**grid)


def dequantize(options, packed):
    """The original model with every quantized linear's weight as GPTQModel decodes it."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    quantized = GPTQModel.load(packed, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    n_linears = 0
    with torch.no_grad():
        for name, module in quantized.model.named_modules():
            if hasattr(module, "dequantize_weight"):
                # Scales are stored in f16, which the kernel asks for; the product with the codes is taken in f32.
                plain.get_submodule(name).weight.copy_(module.float().dequantize_weight().T)
                n_linears += 1
    expected = sum(isinstance(module, torch.nn.Linear) for module in plain.model.modules())
    if n_linears != expected:
        raise SystemExit(f"{packed}: {n_linears} of {expected} linears are quantized")
    return plain


def main():
    options = peer.arguments(__doc__, lambda parser: parser.add_argument(
        "--gptaq", action="store_true", help="asymmetric calibration with GPTQModel's default strength"))
    for name in ("model", "tokens", "output"):
        setattr(options, name, os.path.abspath(getattr(options, name)))
    os.chdir(tempfile.mkdtemp(prefix="gptqmodel-"))  # it leaves a folder of logs where it is run
    # Its pool refuses one worker.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, options.threads)))
    import torch
    from gptqmodel import GPTQModel
    from transformers import AutoTokenizer

    torch.set_num_threads(options.threads)
    ids = peer.read_tokens(options)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    packed = f"{options.output}-gptq"
    model = GPTQModel.load(options.model, quantize_config(options), device=options.device, dtype=getattr(torch, options.dtype))
    with peer.Clock() as clock:
        model.quantize(rows, batch_size=1)
    model.save(packed)
    clock.saved()
    # Before the decoding, which is ours: its memory is not GPTQModel's.
    name = "GPTQModel GPTAQ" if options.gptaq else "GPTQModel GPTQ"
    peer.report(options, name, ["gptqmodel"], clock, len(ids), len(ids[0]))
    peer.save_plain(dequantize(options, packed), AutoTokenizer.from_pretrained(options.model), options.output)
    shutil.rmtree(packed)
    shutil.rmtree(os.getcwd())


if __name__ == "__main__":
    main()
