#!/usr/bin/env python3
"""Compares isobath's model with transformers on a Hugging Face model directory, both in f32.

Runs the C++ probe on seeded random tokens, runs transformers with autograd on the same, and prints the largest
differences of the logits, of the summed loss, and of its gradient at the output of every linear.

  logits    max |a - b| / max |b|     tolerance 1e-4
  gradient  ‖a - b‖ / ‖b‖             tolerance 1e-3
  loss      |a - b| / b               tolerance 1e-5

Usage: .venv/bin/python tools/python/compare_with_transformers.py MODEL_DIR [--tokens N] [--probe PATH]
Exit status 0: within tolerance; 1: not; 2: cannot run.
"""

import argparse
import collections
import pathlib
import subprocess
import sys
import tempfile

import safetensors.torch
import torch
import transformers

LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-5


def find_probe():
    root = pathlib.Path(__file__).resolve().parents[2]
    built = sorted(root.glob("build/*/tests/model_probe"), key=lambda path: path.stat().st_mtime)
    if not built:
        sys.exit("no build/*/tests/model_probe: build the project with its tests first, or give --probe")
    return built[-1]


def run_probe(probe, model_dir, tokens):
    with tempfile.TemporaryDirectory() as scratch:
        tokens_file, out_file = pathlib.Path(scratch, "tokens.safetensors"), pathlib.Path(scratch, "out.safetensors")
        safetensors.torch.save_file({"tokens": tokens.to(torch.int32)}, tokens_file)
        status = subprocess.run([probe, model_dir, tokens_file, out_file]).returncode
        if status != 0:
            print(f"{probe} failed with status {status}", file=sys.stderr)
            sys.exit(2)
        return safetensors.torch.load_file(out_file)


def run_transformers(model_dir, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    model.requires_grad_(False)
    outputs = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            outputs[f"gradient.{name}"] = output
        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(keep(name))
    embedded = model.get_input_embeddings()(tokens).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1),
                                             reduction="sum")
    loss.backward()
    return logits.detach(), loss.item(), {name: output.grad for name, output in outputs.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=pathlib.Path)
    parser.add_argument("--tokens", type=int, default=128, help="length of the sequence (default 128)")
    parser.add_argument("--probe", type=pathlib.Path, help="default: the newest build/*/tests/model_probe")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    config = transformers.AutoConfig.from_pretrained(arguments.model_dir)
    tokens = torch.randint(0, config.vocab_size, (1, arguments.tokens),
                           generator=torch.Generator().manual_seed(arguments.seed))
    found = run_probe(arguments.probe or find_probe(), arguments.model_dir, tokens)
    logits, loss, gradients = run_transformers(arguments.model_dir, tokens)

    unmatched = (set(gradients) | {"gradient.hidden", "logits", "nll_sum"}) ^ set(found)
    if unmatched:
        print(f"only one of the two has {sorted(unmatched)}", file=sys.stderr)
        return 1
    rows = [("logits", ((found["logits"] - logits).abs().max() / logits.abs().max()).item(), LOGITS_TOLERANCE, "1 tensor"),
            ("loss", abs(found["nll_sum"].item() - loss) / loss, LOSS_TOLERANCE, f"{loss:.6f} nats")]
    worst = collections.defaultdict(lambda: (-1.0, ""))
    counts = collections.Counter()
    for name, expected in gradients.items():
        kind = name.rsplit(".", 1)[-1]
        error = ((found[name] - expected).norm() / expected.norm()).item()
        counts[kind] += 1
        # A NaN compares as neither larger nor smaller; it must win.
        if error != error or error > worst[kind][0]:
            worst[kind] = (error, name.removeprefix("gradient."))
    rows += [(f"gradient {kind}", error, GRADIENT_TOLERANCE, f"{counts[kind]} modules, worst {where}")
             for kind, (error, where) in worst.items()]

    print(f"{arguments.model_dir}: {arguments.tokens} tokens, f32, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")
    print(f"{'what':<20} {'error':>10} {'tolerance':>10}")
    for what, error, tolerance, remark in rows:
        verdict = "ok" if error <= tolerance else "TOO LARGE"
        print(f"{what:<20} {error:>10.2e} {tolerance:>10.0e}  {verdict}  ({remark})")
    return 0 if all(error <= tolerance for _, error, tolerance, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
