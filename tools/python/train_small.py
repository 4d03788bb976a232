#!/usr/bin/env python3
"""Trains a small Llama from scratch on real text: a second, own model for the quality bench.

  tools/python/real_text.py --output data/small --packages numpy torch transformers sympy networkx
  tools/python/train_small.py --output models/small data/small/calibration.txt

Writes a Hugging Face checkpoint (bf16 weights, config.json, tokenizer.json) that transformers and isobath load. The
byte-level BPE vocabulary is trained on the same text. Everything is computed in f32, and the result is a function
of the text, the options, the versions of the modules (requirements-test.txt) and the number of threads. The
perplexity of windows that were not trained on is printed at the end, before and after rounding to bf16.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
HEAD_DIM = 64
WARMUP = 0.05  # share of the steps in which the learning rate rises
FINAL_RATE = 0.1  # share of the learning rate that is left at the end of the cosine
MAX_GRADIENT_NORM = 1.0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 text files; paragraphs are separated by empty lines")
    parser.add_argument("--output", type=Path, default=Path("models/small"))
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256, help="d_model, a multiple of 128")
    parser.add_argument("--mlp", type=int, default=768, help="d_ff, a multiple of 128")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens of a training window")
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate")
    parser.add_argument("--held-out", type=float, default=0.03, help="share of the windows, at the end, not trained on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.width % 128 or arguments.mlp % 128:
        parser.error("--width and --mlp must be multiples of 128")
    if (arguments.width // HEAD_DIM) % arguments.kv_heads:
        parser.error(f"--kv-heads must divide the {arguments.width // HEAD_DIM} heads of {HEAD_DIM}")
    return arguments


def train_tokenizer(text, vocabulary):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


@torch.no_grad()
def perplexity(model, windows):
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return math.exp(torch.stack(losses).mean())


def rate_of(step, steps, largest):
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return largest * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return largest * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * share)) / 2)


def train(model, windows, arguments):
    """windows: [n, length] i64, visited in a new random order each epoch."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=arguments.rate, betas=(0.9, 0.95), fused=True)
    steps = int(arguments.epochs * len(windows)) // arguments.batch
    order = torch.cat([torch.randperm(len(windows)) for _ in range(math.ceil(arguments.epochs))])
    start, recent = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step, steps, arguments.rate)
        batch = windows[order[step * arguments.batch:(step + 1) * arguments.batch]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {sum(recent) / len(recent):.3f}, "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
            recent.clear()


def write_tokenizer(tokenizer, output, length):
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
        "clean_up_tokenization_spaces": False, "model_max_length": length}, indent=2) + "\n", encoding="utf-8")


def main():
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    text = "\n\n".join(path.read_text(encoding="utf-8").strip() for path in arguments.texts)
    tokenizer = train_tokenizer(text, arguments.vocabulary)
    ids = torch.tensor(tokenizer.encode(text).ids)
    windows = ids[:len(ids) // arguments.length * arguments.length].view(-1, arguments.length)
    n_held_out = max(1, round(arguments.held_out * len(windows)))
    if len(windows) <= n_held_out:
        raise SystemExit(f"train_small.py: the text gives {len(windows)} windows of {arguments.length} tokens, more than "
                         f"{n_held_out} are needed; add text or lower --length")
    heads = arguments.width // HEAD_DIM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=arguments.width, intermediate_size=arguments.mlp,
        num_hidden_layers=arguments.blocks, num_attention_heads=heads, num_key_value_heads=arguments.kv_heads,
        head_dim=HEAD_DIM, max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa"))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters / 1e6:.1f} M parameters, {len(ids)} tokens, {len(windows)} windows", flush=True)
    train(model, windows[:-n_held_out], arguments)
    found = {"parameters": n_parameters, "held_out_tokens": n_held_out * arguments.length,
             "perplexity_f32": round(perplexity(model, windows[-n_held_out:]), 3)}
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    write_tokenizer(tokenizer, arguments.output, arguments.length)
    # What was written, computed in f32: this machine need not be fast in bf16.
    written = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    found["perplexity_bf16_weights"] = round(perplexity(written, windows[-n_held_out:]), 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
