"""Compares the statistics of `isobath measure` with an independent computation in f64.

    compare_statistics.py MODEL_DIR TOKENS.safetensors MEASURE_DIR [--sequences N] [--length T] [--tolerance 1e-4]

Runs the model with transformers in f64, one sequence at a time, with autograd's full weight gradients, and recomputes every
statistic of MEASURE_DIR/block-*.h5 by its formula. Prints the largest relative error of each statistic over all modules
(max |a - b| / max |b| per array) and where it occurred; exits 1 when one is above the tolerance.

Scores of widths (sensitivity.gram.bits) are recomputed from the weight gradients and from this script's own rounding, which
knows min-max grids only: with quantization.clip_search they are not compared. Those from random probes are compared as sums
over the sequences, within --probe-tolerance.

Meant for loss nll and compute dtype f32 (bf16 rounding alone exceeds the default tolerance) and for models whose weights,
gradients and covariances fit in memory in f64. Written for torch 2.15, transformers 5.23, h5py 3, safetensors 0.8.
"""

import argparse
import pathlib
import sys

import h5py
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

MODULES = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MODULES |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}

FROM_PROBES = ("perturbations/output_change", "perturbations/weighted_change")


def read_tokens(path, n_sequences, length):
    with safe_open(path, framework="pt") as file:
        tokens = file.get_tensor("tokens")
        lengths = file.get_tensor("lengths") if "lengths" in file.keys() else None
    tokens = tokens[:n_sequences or None, :length or None].long()
    if lengths is None:
        lengths = torch.full((tokens.shape[0],), tokens.shape[1])
    return tokens, lengths[: tokens.shape[0]].long().clamp(max=tokens.shape[1])


class Grid:
    """Rounding to nearest on min-max grids, as the attributes of a `perturbations` group describe it."""

    def __init__(self, group):
        self.bits = group["bits"][:].tolist()
        self.columns, self.symmetric = int(group.attrs["group"]), bool(group.attrs["symmetric"])
        self.storage = {"BFloat16": torch.bfloat16, "Half": torch.float16, "Float": torch.float32}[text(group.attrs["storage"])]

    def change(self, weight, bits):
        """dW in f64; all steps in f32, scales rounded to the storage type before codes are chosen."""
        lowest, highest, span = -(1 << (bits - 1)), (1 << (bits - 1)) - 1, float((1 << bits) - 1)
        w = weight.float().reshape(weight.shape[0], -1, self.columns or weight.shape[1])
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            scale, zero = torch.maximum(high, -low) / (span / 2), torch.zeros_like(low)
        else:
            scale = high / span - low / span
        scale = scale.to(self.storage).float()
        if not self.symmetric:
            zero = torch.round((lowest - low / scale).clamp(lowest, highest))
        codes = torch.round(w * (1 / scale)).clamp(lowest - zero, highest - zero)
        return (codes * scale).to(self.storage).reshape(weight.shape).double() - weight.double()


class ModuleOracle:
    """Sums of one linear over sequences, all f64."""

    def __init__(self, linear, shape, groups, with_covariance, grid):
        self.linear, self.groups = linear, groups  # rows of each row group
        row_groups = len(groups)
        self.changes = torch.stack([grid.change(linear.weight.data, bits) for bits in grid.bits]) if grid else None
        d = linear.in_features
        self.values = {
            "token_weights": np.zeros((*shape, row_groups)),
            "sum_x2": np.zeros(d), "max_abs_x": np.zeros(d),
            "alpha_per_token": np.zeros(d), "alpha_per_sequence": np.zeros(d),
            "trace of X'X": np.zeros(1),
        }
        if with_covariance:
            self.values["covariance"] = np.zeros((row_groups, d, d))
        if grid:
            n, k = shape[0], len(grid.bits)
            self.values |= {
                "perturbations/first_order": np.zeros((n, 1, k)), "perturbations/gradient_norm": np.zeros((n, 1)),
                "perturbations/weight_change": (self.changes ** 2).sum((1, 2)).numpy(),
                "perturbations/output_change": np.zeros((n, k)), "perturbations/weighted_change": np.zeros((n, k)),
            }
        self.x = self.y = None
        linear.register_forward_hook(self.record)

    def record(self, _, inputs, output):
        output.retain_grad()
        self.x, self.y = inputs[0].detach()[0], output

    def observe(self, sequence, n_real):
        x, g = self.x[:n_real], self.y.grad[0, :n_real]
        v = self.values
        weights = torch.stack([(g[:, rows] ** 2).mean(1) for rows in self.groups], dim=1)
        v["token_weights"][sequence, :n_real] = weights.numpy()
        v["sum_x2"] += (x ** 2).sum(0).numpy()
        v["max_abs_x"] = np.maximum(v["max_abs_x"], x.abs().amax(0).numpy())
        v["alpha_per_token"] += ((g ** 2).sum(1) @ x ** 2).numpy()
        v["alpha_per_sequence"] += (self.linear.weight.grad ** 2).sum(0).numpy()  # the diagonal of dW'dW
        v["trace of X'X"] += torch.linalg.matrix_norm(x).item() ** 2
        if self.changes is not None:
            dw, scores = self.linear.weight.grad, {key: v["perturbations/" + key] for key in (
                "first_order", "gradient_norm", "output_change", "weighted_change")}
            scores["first_order"][sequence, 0] = (dw * self.changes).sum((1, 2)).numpy()
            scores["gradient_norm"][sequence, 0] = (dw ** 2).sum().item()
            energy = ((x @ self.changes.transpose(1, 2)) ** 2).sum(2)  # [k, n_real]
            scores["output_change"][sequence] = energy.sum(1).numpy()
            scores["weighted_change"][sequence] = (energy @ weights.mean(1)).numpy()
        if "covariance" in v:
            for k in range(len(self.groups)):
                v["covariance"][k] += (x.T @ (weights[:, k, None] * x)).numpy()
        self.x = self.y = None


def groups_of(module, n_rows, n_groups):
    """Rows of each row group: those the file names, or equal runs, the first of which have one row more."""
    if "row_order" not in module:
        return torch.tensor_split(torch.arange(n_rows), n_groups)
    order, sizes = torch.from_numpy(module["row_order"][:]), module["row_group_sizes"][:].tolist()
    if sorted(order.tolist()) != list(range(n_rows)) or len(sizes) != n_groups or min(sizes) < 1:
        sys.exit(f"{module.name}: row_order is no permutation of {n_rows} rows in {n_groups} groups")
    return torch.split(order, sizes)


def recompute(arguments, row_groups, with_covariance, grid):
    tokens, lengths = read_tokens(arguments.tokens, arguments.sequences, arguments.length)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float64, attn_implementation="eager").eval().requires_grad_(False)
    oracles = {}
    for block, layer in enumerate(model.model.layers):
        with h5py.File(arguments.measure / f"block-{block:05d}.h5") as file:
            for name, path in MODULES.items():
                linear = layer.get_submodule(path).requires_grad_(True)
                groups = groups_of(file[name], linear.out_features, row_groups)
                oracles[block, name] = ModuleOracle(linear, tokens.shape, groups, with_covariance, grid)
    for sequence, n_real in enumerate(lengths.tolist()):
        model.zero_grad()
        row = tokens[sequence, :n_real]
        logits = model(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for oracle in oracles.values():
            oracle.observe(sequence, n_real)
    return oracles


def relative_error(found, expected, name):
    if found.shape != expected.shape:
        sys.exit(f"{name}: the file has shape {found.shape}, expected {expected.shape} (--sequences, --length?)")
    if not np.isfinite(found).all():
        return np.inf
    largest = np.abs(expected).max()
    return np.abs(found - expected).max() / (largest if largest > 0 else 1.0)


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("measure", type=pathlib.Path)
    parser.add_argument("--sequences", type=int, default=0, help="first N sequences; 0: all")
    parser.add_argument("--length", type=int, default=0, help="first T tokens of each; 0: all")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--probe-tolerance", type=float, default=0.3, help="of estimates from random probes")
    arguments = parser.parse_args()

    first = arguments.measure / "block-00000.h5"
    if not first.exists():
        sys.exit(f"{first} does not exist: expected the measure/ directory of a finished run")
    with h5py.File(first) as file:
        attributes = {key: text(value) for key, value in file.attrs.items()}
        row_groups = file["q_proj/token_weights"].shape[2]
        with_covariance = "covariance" in file["q_proj"]
        scored = file["q_proj"].get("perturbations")
        has_clip_search = scored is not None and bool(scored.attrs["clip_search"])
        grid = Grid(scored) if scored is not None and not has_clip_search else None
    if attributes.get("loss", "nll") != "nll":
        sys.exit(f"{first}: loss {attributes['loss']}; only nll can be recomputed without isobath's random numbers")
    exact = attributes.get("per_sequence") == "exact"

    oracles = recompute(arguments, row_groups, with_covariance, grid)
    blocks = 1 + max(block for block, _ in oracles)
    worst = {}
    for block in range(blocks):
        with h5py.File(arguments.measure / f"block-{block:05d}.h5") as file:
            for name in MODULES:
                group, expected = file[name], oracles[block, name].values
                for key, reference in expected.items():
                    if key == "alpha_per_sequence" and not exact:
                        continue
                    found = group["sum_x2"][:].sum(keepdims=True) if key == "trace of X'X" else group[key][:]
                    if key in FROM_PROBES:
                        found, reference = found.sum(0), reference.sum(0)
                    error = relative_error(found.astype(np.float64), reference, f"block {block} {name} {key}")
                    if key not in worst or error > worst[key][0]:
                        worst[key] = (error, f"block {block} {name}")

    print(f"{blocks} blocks, {len(oracles)} modules, {row_groups} row groups, compute dtype "
          f"{attributes.get('compute_dtype', '?')}, tolerance {arguments.tolerance:g}")
    print(f"{'statistic':<29} {'largest error':>14}  where")
    failed = False
    for key, (error, where) in worst.items():
        is_above = not error <= (arguments.probe_tolerance if key in FROM_PROBES else arguments.tolerance)
        failed = failed or is_above
        print(f"{key:<29} {error:>14.2e}  {where}{'  ABOVE' if is_above else ''}")
    if has_clip_search:
        print("perturbations        not compared: their grids are from a clip search, not min-max")
    if not exact:
        print(f"alpha_per_sequence   not compared: per_sequence is {attributes.get('per_sequence', 'absent')}, not exact")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
