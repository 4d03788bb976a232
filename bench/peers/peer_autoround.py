#!/usr/bin/env python3
"""AutoRound on isobath's own token file: same model, same tokens, same bits and group.

  .cache/peers/autoround/bin/python bench/peers/peer_autoround.py MODEL TOKENS OUTPUT --bits 3 --group 64 [--iterations 200]

bench/peers/setup.sh autoround makes that Python. The checkpoint holds the weights as AutoRound dequantizes them, in bf16.
Prints one JSON line: versions, seconds, peak resident memory.
"""
import peer


def own_options(parser):
    parser.add_argument("--iterations", type=int, default=200, help="tuning steps a block; 200 is AutoRound's default")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step; 8 is AutoRound's default")


def main():
    options = peer.arguments(__doc__, own_options)
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    ids = peer.read_tokens(options)
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.int64)} for row in ids]
    with peer.Clock() as clock:
        tuner = AutoRound(model, tokenizer, bits=options.bits, group_size=options.group, sym=not options.asymmetric,
                          iters=options.iterations, batch_size=options.batch, seqlen=len(ids[0]), nsamples=len(ids),
                          dataset=rows, device_map=options.device, enable_torch_compile=False,
                          # Computing in bf16 is its default; without it f32 blocks would still be cast.
                          amp=options.dtype == "bfloat16")
        quantized, _ = tuner.quantize()
    peer.save_plain(quantized, tokenizer, options.output)
    clock.saved()
    peer.report(options, "AutoRound", ["auto-round"], clock, len(ids), len(ids[0]), iterations=options.iterations,
                batch=options.batch)


if __name__ == "__main__":
    main()
