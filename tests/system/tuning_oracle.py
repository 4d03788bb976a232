"""Scales that `quantization.tuning` leaves, against its steps recomputed in f64: the model by transformers, gradients by
autograd through the decoded weights, Adam on the logarithms of the scales by its formula."""
import json
import pathlib
import sys

import torch
from isobath_system import LENGTH, SEQUENCES, Workspace, model_weights, run_well, write_model, write_tokens
from safetensors import safe_open
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tools/python"))
from check_checkpoint import packed_modules  # noqa: E402

EPOCHS, STEPS, RATE = 2, 2, 0.05
DECAY_OF_MEAN, DECAY_OF_SQUARE, EPSILON = 0.9, 0.95, 1e-8
# Of log(s / s0), against RATE: isobath computes in f32, and where a gradient is next to nothing a step is its direction alone.
TOLERANCE = 1e-3
SHARE_OF_UNCERTAIN = 0.02
LEAST_GRADIENT = 1e-3  # of the root mean square of the module's: smaller ones are uncertain
KL_TOLERANCE = 1e-5  # relative; f32 against f64
# Of the output projection. Without it the divergence is 5e-4 nats, and its gradient a difference of nearly equal numbers.
CONTRAST = 16
PADDED = [LENGTH - 5] + [LENGTH] * (SEQUENCES - 1)


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval().requires_grad_(False)


class Student:
    """The quantized model with its scales as leaves."""

    def __init__(self, original, untuned):
        self.model = load(original)
        self.levels, self.logarithms, self.first = {}, {}, {}
        for module, levels, scale in packed_modules(untuned):
            self.levels[module], self.first[module] = levels.double(), scale.double()
            self.logarithms[module] = torch.zeros_like(self.first[module], requires_grad=True)

    def logits(self, row):
        weights = {f"{module}.weight": (levels * (self.first[module] * self.logarithms[module].exp()).unsqueeze(-1)).flatten(1)
                   for module, levels in self.levels.items()}
        return torch.func.functional_call(self.model, weights, (row[None],)).logits[0, :-1]


def divergence(teacher, student, row):
    """KL(original || quantized) summed over the predicted tokens, and their number."""
    with torch.no_grad():
        expected = torch.log_softmax(teacher(row[None]).logits[0, :-1], -1)
    found = torch.log_softmax(student.logits(row), -1)
    return (expected.exp() * (expected - found)).sum(), len(expected)


def tune(original, untuned, tokens, lengths):
    """log(s / s0) of each module after all steps, which of its scales are certain, and the divergence a token of each epoch."""
    teacher, student = load(original), Student(original, untuned)
    leaves = student.logarithms
    mean = {module: torch.zeros_like(leaf) for module, leaf in leaves.items()}
    square = {module: torch.zeros_like(leaf) for module, leaf in leaves.items()}
    certain = {module: torch.ones_like(leaf, dtype=torch.bool) for module, leaf in leaves.items()}
    totals, counts = [0.0] * EPOCHS, [0] * EPOCHS
    for n in range(1, EPOCHS * STEPS + 1):
        part = (n - 1) % STEPS
        parts = [divergence(teacher, student, tokens[i, :lengths[i]]) for i in range(part, len(tokens), STEPS)]
        total, count = sum(kl for kl, _ in parts), sum(n_tokens for _, n_tokens in parts)
        gradients = dict(zip(leaves, torch.autograd.grad(total / count, list(leaves.values()))))
        totals[(n - 1) // STEPS] += total.item()
        counts[(n - 1) // STEPS] += count
        rate = RATE * (1 - (n - 1) / (EPOCHS * STEPS))
        for module, gradient in gradients.items():
            certain[module] &= gradient.abs() > LEAST_GRADIENT * gradient.square().mean().sqrt()
            mean[module] = DECAY_OF_MEAN * mean[module] + (1 - DECAY_OF_MEAN) * gradient
            square[module] = DECAY_OF_SQUARE * square[module] + (1 - DECAY_OF_SQUARE) * gradient.square()
            step = (mean[module] / (1 - DECAY_OF_MEAN ** n)) / ((square[module] / (1 - DECAY_OF_SQUARE ** n)).sqrt() + EPSILON)
            leaves[module].data -= rate * step
    return ({module: leaf.detach() for module, leaf in leaves.items()}, certain,
            [total / count for total, count in zip(totals, counts)])


for bits, symmetric in ((3, True), (2, False)):
    with Workspace("float32") as space:
        write_tokens(space.path / "calibration.safetensors", lengths=PADDED)
        grid = {"bits": bits, "group": 32, "symmetric": symmetric}
        weights = model_weights(1)
        weights["lm_head.weight"] *= CONTRAST
        model = write_model(space.path / "contrast", "float32", weights=weights)
        common = {"model": str(model), "compute_dtype": "float32", "calibration": {"logical_shards": SEQUENCES}}
        run_well(space.config("untuned", quantization=grid, **common))
        run_well(space.config("tuned", quantization={**grid, "tuning": {"epochs": EPOCHS, "steps": STEPS, "rate": RATE}}, **common),
                 stages=2, replicas=2)
        with safe_open(space.path / "calibration.safetensors", "pt") as file:
            tokens, lengths = file.get_tensor("tokens").long(), file.get_tensor("lengths").tolist()
        expected, certain, kl = tune(model, space.path / "untuned/model", tokens, lengths)
        events = [json.loads(line) for line in (space.path / "tuned/events.jsonl").read_text().splitlines()]
        reported = [event["kl_per_token"] for event in events if event["event"] == "tuned"]
        assert len(reported) == EPOCHS and all(abs(a / b - 1) < KL_TOLERANCE for a, b in zip(reported, kl)), (reported, kl)
        before = {module: (levels, scale) for module, levels, scale in packed_modules(space.path / "untuned/model")}
        worst, n_uncertain, n_scales = 0.0, 0, 0
        for module, levels, scale in packed_modules(space.path / "tuned/model"):
            assert torch.equal(levels, before[module][0]), f"{module}: tuning changed codes or zero points"
            found = (scale.double() / before[module][1].double()).log()
            error = ((found - expected[module]).abs() / RATE)[certain[module]].max().item()
            assert error < TOLERANCE, f"{module}: log(s/s0) differs by {error:.2e} of the rate"
            worst = max(worst, error)
            n_uncertain += int((~certain[module]).sum())
            n_scales += scale.numel()
        assert n_scales and n_uncertain < SHARE_OF_UNCERTAIN * n_scales, f"{n_uncertain} of {n_scales} scales uncertain"
        print(f"{bits} bits: {n_scales} scales, {n_uncertain} uncertain, the largest difference {worst:.2e} of the rate; KL {kl}",
              flush=True)
