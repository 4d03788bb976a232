"""Compares the statistics of `isobath measure` with an independent computation in f64.

    compare_statistics.py MODEL_DIR TOKENS.safetensors MEASURE_DIR [--sequences N] [--length T] [--tolerance 1e-4]

Runs the model with transformers in f64, one sequence at a time, with autograd's full weight gradients, and recomputes every
statistic of MEASURE_DIR/block-*.h5 by its formula. Prints the largest relative error of each statistic over all modules
(max |a - b| / max |b| per array) and where it occurred; exits 1 when one is above the tolerance.

With MEASURE_DIR RUN/measure/before-block-N the statistics are those of blocks N and later, behind blocks that have the
weights of the checkpoint RUN/model, decoded here; the losses in RUN/reestimations.json are compared too. That is not for runs
with quantization.tuning, which changes the checkpoint's scales afterwards.

D is heavy-tailed, so each of its entries is compared for itself too, within --token-tolerance: |a - b| / max(b, mean b / 100).
Smaller ones may be rounding alone, as the first token's are at q and k.

Scores of widths (sensitivity.gram.bits) are recomputed from the weight gradients and from this script's own rounding, which
knows min-max grids only: with quantization.clip_search they are not compared. Those from random probes are compared as sums
over the sequences, within --probe-tolerance.

Labels of loss fisher are drawn here as the run draws them: by inverse transform from the model's probabilities, with
uniform numbers of Philox4x32-10 (Salmon et al., SC11) at counter (sequence, token, draw, 1) and the run's seed as key.

Meant for compute dtype f32 (bf16 rounding alone exceeds the default tolerance) and for models whose weights,
gradients and covariances fit in memory in f64. Written for torch 2.15, transformers 5.23, h5py 3, safetensors 0.8.
"""

import argparse
import json
import pathlib
import re
import sys

import h5py
import numpy as np
import torch
from check_checkpoint import decoded_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM

MODULES = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MODULES |= {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}

FROM_PROBES = ("perturbations/output_change", "perturbations/weighted_change")
EACH = "token_weights, each"
SMALLEST_D = 0.01  # of the mean
# Relative, f32 against f64. KL is a difference of log-probabilities that agree in most digits: where it is 1e-3 nats, 1e-5
# of it is lost.
LOSS_TOLERANCES = {"nll_per_token": 1e-6, "kl_per_token": 1e-4}
# Of cumulative probability: a draw that is nearer to its label's bounds may in f32 have been another one. No error, but told.
DRAW_UNCERTAINTY = 1e-6


def read_tokens(path, n_sequences, length):
    with safe_open(path, framework="pt") as file:
        tokens = file.get_tensor("tokens")
        lengths = file.get_tensor("lengths") if "lengths" in file.keys() else None
    tokens = tokens[:n_sequences or None, :length or None].long()
    if lengths is None:
        lengths = torch.full((tokens.shape[0],), tokens.shape[1])
    return tokens, lengths[: tokens.shape[0]].long().clamp(max=tokens.shape[1])


def load_model(directory):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager").eval().requires_grad_(False)


class Prefix:
    """What stood before the first block that a directory of statistics tells of."""

    def __init__(self, measure):
        found = re.fullmatch(r"before-block-(\d+)", measure.resolve().name)
        self.first_block, self.weights, self.recorded = (int(found[1]) if found else 0), {}, {}
        if not found:
            return
        run = measure.resolve().parents[1]
        for module, weight in decoded_weights(run / "model"):
            if int(re.search(r"layers\.(\d+)\.", module)[1]) < self.first_block:
                self.weights[module] = weight.double()
        if not self.weights:
            sys.exit(f"{run}/model has no quantized linear before block {self.first_block}")
        records = [r for r in json.loads((run / "reestimations.json").read_text()) if r["block"] == self.first_block]
        if len(records) != 1 or not records[0]["refreshed"]:
            sys.exit(f"{run}/reestimations.json tells of no measurement before block {self.first_block}")
        self.recorded = {key: value for key, value in records[0].items() if key.endswith("_per_token")}

    def put_into(self, model):
        for module, weight in self.weights.items():
            model.get_submodule(module).weight.data.copy_(weight)
        return model


def philox4x32(counter, key):
    """Philox4x32-10: four words of 32 bits from four and two."""
    (a, b, c, d), (k0, k1), word = counter, key, 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (product1 >> 32) ^ b ^ k0, product1 & word, (product0 >> 32) ^ d ^ k1, product0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return a, b, c, d


class Loss:
    """The loss that is run backward, by name; counts what nll and KL come to per predicted token."""

    def __init__(self, attributes, model_directory):
        self.name, self.n_samples = attributes.get("loss", "nll"), int(attributes.get("samples", 1))
        self.seed = int(attributes.get("seed", 0))
        self.original = load_model(model_directory) if self.name == "kl" else None
        self.sums, self.n_tokens, self.n_uncertain = {"nll": 0.0, "kl": 0.0}, 0, 0

    def of(self, logits, row, sequence, sample):
        """Summed over the tokens of one sequence that logits [n, vocabulary] predict."""
        nll = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
        if sample == 0:
            self.sums["nll"] += nll.item()
            self.n_tokens += len(logits)
        if self.name == "nll":
            return nll
        if self.name == "fisher":
            labels = self.drawn(torch.softmax(logits.detach(), -1), sequence, sample)
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            expected = torch.log_softmax(self.original(row[None]).logits[0, :-1], -1)
        kl = (expected.exp() * (expected - torch.log_softmax(logits, -1))).sum()
        self.sums["kl"] += kl.item()
        return kl

    def drawn(self, probabilities, sequence, sample):
        key = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        words = [philox4x32((sequence, token, sample, 1), key)[:2] for token in range(len(probabilities))]
        uniform = torch.tensor([((high << 32 | low) >> 11) * 2.0 ** -53 for high, low in words], dtype=torch.float64)[:, None]
        cumulative = probabilities.cumsum(-1)
        self.n_uncertain += int(((cumulative - uniform).abs().amin(1) < DRAW_UNCERTAINTY).sum())
        return torch.searchsorted(cumulative, uniform, right=True).clamp_(max=probabilities.shape[1] - 1)[:, 0]

    def per_token(self):
        names = ("nll", "kl") if self.name == "kl" else ("nll",)
        return {f"{name}_per_token": self.sums[name] / self.n_tokens for name in names}


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
    """Sums of one linear over sequences, means over label draws, all f64."""

    def __init__(self, linear, shape, groups, with_covariance, grid, n_samples):
        self.linear, self.groups, self.share = linear, groups, 1 / n_samples  # groups: rows of each row group
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
        v["token_weights"][sequence, :n_real] += self.share * weights.numpy()
        v["sum_x2"] += self.share * (x ** 2).sum(0).numpy()
        v["max_abs_x"] = np.maximum(v["max_abs_x"], x.abs().amax(0).numpy())
        v["alpha_per_token"] += self.share * ((g ** 2).sum(1) @ x ** 2).numpy()
        v["alpha_per_sequence"] += self.share * (self.linear.weight.grad ** 2).sum(0).numpy()  # the diagonal of dW'dW
        v["trace of X'X"] += self.share * torch.linalg.matrix_norm(x).item() ** 2
        if self.changes is not None:
            dw, scores = self.linear.weight.grad, {key: v["perturbations/" + key] for key in (
                "first_order", "gradient_norm", "output_change", "weighted_change")}
            scores["first_order"][sequence, 0] = (dw * self.changes).sum((1, 2)).numpy()
            scores["gradient_norm"][sequence, 0] = (dw ** 2).sum().item()
            energy = ((x @ self.changes.transpose(1, 2)) ** 2).sum(2)  # [k, n_real]
            scores["output_change"][sequence] = energy.sum(1).numpy()
            scores["weighted_change"][sequence] = (energy @ (g ** 2).mean(1)).numpy()
        if "covariance" in v:
            for k in range(len(self.groups)):
                v["covariance"][k] += self.share * (x.T @ (weights[:, k, None] * x)).numpy()
        self.x = self.y = None


def groups_of(module, n_rows, n_groups):
    """Rows of each row group: those the file names, or equal runs, the first of which have one row more."""
    if "row_order" not in module:
        return torch.tensor_split(torch.arange(n_rows), n_groups)
    order, sizes = torch.from_numpy(module["row_order"][:]), module["row_group_sizes"][:].tolist()
    if sorted(order.tolist()) != list(range(n_rows)) or len(sizes) != n_groups or min(sizes) < 1:
        sys.exit(f"{module.name}: row_order is no permutation of {n_rows} rows in {n_groups} groups")
    return torch.split(order, sizes)


def recompute(arguments, prefix, loss, row_groups, with_covariance, grid):
    tokens, lengths = read_tokens(arguments.tokens, arguments.sequences, arguments.length)
    model = prefix.put_into(load_model(arguments.model))
    oracles = {}
    for block, layer in list(enumerate(model.model.layers))[prefix.first_block:]:
        with h5py.File(arguments.measure / f"block-{block:05d}.h5") as file:
            for name, path in MODULES.items():
                linear = layer.get_submodule(path).requires_grad_(True)
                groups = groups_of(file[name], linear.out_features, row_groups)
                oracles[block, name] = ModuleOracle(linear, tokens.shape, groups, with_covariance, grid, loss.n_samples)
    for sequence, n_real in enumerate(lengths.tolist()):
        row = tokens[sequence, :n_real]
        for sample in range(loss.n_samples):
            model.zero_grad()
            loss.of(model(row[None]).logits[0, :-1], row, sequence, sample).backward()
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


def error_of_each(found, expected):
    error = np.abs(found - expected) / np.maximum(expected, SMALLEST_D * expected.mean())
    return error.max() if np.isfinite(error).all() else np.inf


def text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("tokens", type=pathlib.Path)
    parser.add_argument("measure", type=pathlib.Path)
    parser.add_argument("--sequences", type=int, default=0, help="first N sequences; 0: all")
    parser.add_argument("--length", type=int, default=0, help="first T tokens of each; 0: all")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--token-tolerance", type=float, default=1e-3, help="of each entry of D")
    parser.add_argument("--probe-tolerance", type=float, default=0.3, help="of estimates from random probes")
    arguments = parser.parse_args(words)

    prefix = Prefix(arguments.measure)
    first = arguments.measure / f"block-{prefix.first_block:05d}.h5"
    if not first.exists():
        sys.exit(f"{first} does not exist: expected the measure/ directory of a finished run")
    with h5py.File(first) as file:
        attributes = {key: text(value) for key, value in file.attrs.items()}
        row_groups = file["q_proj/token_weights"].shape[2]
        with_covariance = "covariance" in file["q_proj"]
        scored = file["q_proj"].get("perturbations")
        has_clip_search = scored is not None and bool(scored.attrs["clip_search"])
        grid = Grid(scored) if scored is not None and not has_clip_search else None
    loss = Loss(attributes, arguments.model)
    if grid and loss.n_samples > 1:
        sys.exit(f"{first}: scores of widths are recomputed for one label draw only, not for {loss.n_samples}")
    exact = attributes.get("per_sequence") == "exact"

    oracles = recompute(arguments, prefix, loss, row_groups, with_covariance, grid)
    blocks = sorted({block for block, _ in oracles})
    worst = {}

    def note(key, error, where):
        if key not in worst or error > worst[key][0]:
            worst[key] = (error, where)

    for block in blocks:
        with h5py.File(arguments.measure / f"block-{block:05d}.h5") as file:
            for name in MODULES:
                group, expected = file[name], oracles[block, name].values
                for key, reference in expected.items():
                    if key == "alpha_per_sequence" and not exact:
                        continue
                    found = group["sum_x2"][:].sum(keepdims=True) if key == "trace of X'X" else group[key][:]
                    if key in FROM_PROBES:
                        found, reference = found.sum(0), reference.sum(0)
                    found, where = found.astype(np.float64), f"block {block} {name}"
                    note(key, relative_error(found, reference, f"{where} {key}"), where)
                    if key == "token_weights":
                        note(EACH, error_of_each(found, reference), where)

    print(f"{len(blocks)} blocks from {prefix.first_block}, {len(oracles)} modules, {row_groups} row groups, loss {loss.name}, "
          f"compute dtype {attributes.get('compute_dtype', '?')}, tolerance {arguments.tolerance:g}")
    print(f"{'statistic':<29} {'largest error':>14}  where")
    failed = False
    tolerances = {EACH: arguments.token_tolerance} | dict.fromkeys(FROM_PROBES, arguments.probe_tolerance)
    for key, (error, where) in worst.items():
        is_above = not error <= tolerances.get(key, arguments.tolerance)
        failed = failed or is_above
        print(f"{key:<29} {error:>14.2e}  {where}{'  ABOVE' if is_above else ''}")
    for key, reference in (loss.per_token() if prefix.weights else {}).items():
        found = prefix.recorded.get(key, np.nan)
        error = abs(found / reference - 1)
        is_above = not error <= LOSS_TOLERANCES[key]
        failed = failed or is_above
        print(f"{key:<29} {error:>14.2e}  {found:.6g} in reestimations.json{'  ABOVE' if is_above else ''}")
    if loss.n_uncertain:
        print(f"{loss.n_uncertain} drawn labels may be others in f32")
    if has_clip_search:
        print("perturbations        not compared: their grids are from a clip search, not min-max")
    if not exact:
        print(f"alpha_per_sequence   not compared: per_sequence is {attributes.get('per_sequence', 'absent')}, not exact")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
