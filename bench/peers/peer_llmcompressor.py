#!/usr/bin/env python3
"""GPTQ or AWQ by llm-compressor on isobath's own token file: same model, same tokens, same bits and group.

  .cache/peers/llmcompressor/bin/python bench/peers/peer_llmcompressor.py MODEL TOKENS OUTPUT --bits 3 --group 64 [--method awq]

bench/peers/setup.sh llmcompressor makes that Python. Prints one JSON line: versions, seconds, peak resident memory.
"""
import peer

METHODS = {"gptq": "llm-compressor GPTQ", "awq": "llm-compressor AWQ"}


def make_recipe(options):
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    scheme = {"targets": ["Linear"],
              "weights": {"num_bits": options.bits, "type": "int", "symmetric": not options.asymmetric,
                          "strategy": "group", "group_size": options.group}}
    grid = {"ignore": ["lm_head"], "config_groups": {"group_0": scheme}}
    if options.method == "gptq":
        return [GPTQModifier(**grid)]
    return [AWQModifier(), QuantizationModifier(**grid)]


def own_options(parser):
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--batch", type=int, default=1, help="sequences a forward pass; 1 is llm-compressor's default")


def main():
    options = peer.arguments(__doc__, own_options)
    import torch
    from compressed_tensors.offload import remove_dispatch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    ids = peer.read_tokens(options)
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    if options.device == "cpu":
        # AWQ pins its cache; torch 2.11 and others with CUDA raise at that where no driver is.
        from llmcompressor.pipelines.cache import IntermediatesCache
        IntermediatesCache.pin_memory = lambda *_, **__: None
    with peer.Clock() as clock:
        oneshot(model=model, dataset=dataset, processor=tokenizer, max_seq_length=len(ids[0]),
                num_calibration_samples=len(ids), recipe=make_recipe(options), batch_size=options.batch,
                sequential_offload_device=options.device)
    # It takes the GPU by itself, and its hooks stay: through them .to() would change copies on the GPU alone.
    remove_dispatch(model)
    # Codes are taken from the dequantized weights and the scales when the checkpoint is written, so rounding both to
    # bf16 first keeps the codes (relative error 2^-8, codes below 16) and stores scales as the bf16 run does.
    model.to(torch.bfloat16)
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    clock.saved()
    peer.report(options, METHODS[options.method], ["llmcompressor", "compressed-tensors"], clock, len(ids), len(ids[0]))


if __name__ == "__main__":
    main()
