"""Makes gptq_golden.safetensors: Algorithm 1 of GPTQ on min-max grids in f64 numpy, written from the paper
and sharing no code with the project. Run with numpy 2.4.6, safetensors 0.8.0: python make_gptq_golden.py

Codes must agree, per row, up to the first column where f64 itself is within 1e-3 steps of a tie (f32 may decide
otherwise there); `margin` is each column's distance to its nearest rounding boundary in steps, 0.5 at most.
"""

import os

import numpy as np
from safetensors.numpy import save_file

ROWS, COLUMNS, DAMPING = 24, 128, 0.01
# group (0: channel), symmetric, act-order
CASES = ((16, True, False), (32, False, False), (0, True, True), (32, True, True), (0, False, False))


def to_bf16(x):
    """Rounds f64 -> f32 -> bfloat16 (nearest even), returned as f64."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def min_max_grid(w, bits, symmetric):
    """scale, zero of each row of w."""
    lowest, levels = -(2 ** (bits - 1)), 2**bits - 1
    if symmetric:
        return to_bf16(np.abs(w).max(1) / (levels / 2)), np.zeros(len(w))
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    scale = to_bf16((high - low) / levels)
    return scale, np.rint(lowest - low / scale)


def gptq(w, h, bits, group, symmetric, act_order):
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows, columns = w.shape
    w, h = w.astype(np.float64).copy(), h.astype(np.float64).copy()
    diagonal = np.diag(h).copy()
    dead = diagonal == 0
    w[:, dead] = 0
    h[dead, dead] = 1
    h += DAMPING * diagonal[~dead].mean() * np.eye(columns)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(columns)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    width = group or columns
    scale, zero = np.zeros((rows, columns // width)), np.zeros((rows, columns // width))
    if act_order:
        for g in range(columns // width):
            scale[:, g], zero[:, g] = min_max_grid(w[:, g * width : (g + 1) * width], bits, symmetric)
    current = w[:, order]
    codes, margin, quantized = np.zeros((rows, columns)), np.zeros((rows, columns)), np.zeros((rows, columns))
    for i in range(columns):
        column = order[i]
        g = column // width
        if not act_order and i % width == 0:
            scale[:, g], zero[:, g] = min_max_grid(current[:, i : i + width], bits, symmetric)
        target = current[:, i] / scale[:, g]
        margin[:, i] = 0.5 - np.abs(target - np.rint(target))
        q = np.clip(np.rint(target) + zero[:, g], lowest, highest)
        codes[:, column] = q
        quantized[:, column] = to_bf16((q - zero[:, g]) * scale[:, g])
        error = (current[:, i] - quantized[:, column]) / upper[i, i]
        current[:, i:] -= np.outer(error, upper[i, i:])
    return codes, scale, zero, margin, order, quantized


def main():
    rng = np.random.default_rng(20261122)
    mix = rng.standard_normal((COLUMNS, COLUMNS)) / np.sqrt(COLUMNS) + np.eye(COLUMNS)
    x = (rng.standard_normal((400, COLUMNS)) * np.exp(0.7 * rng.standard_normal(COLUMNS))) @ mix
    x[:, 37] = 0  # a dead column
    h = (x.T @ x / len(x)).astype(np.float32)
    h = (h + h.T) / 2
    w = (0.05 * rng.standard_normal((ROWS, COLUMNS))).astype(np.float32)
    tensors = {"weight": w, "hessian": h}
    for bits in (2, 3, 4, 8):
        for group, symmetric, act_order in CASES:
            codes, scale, zero, margin, order, quantized = gptq(w, h, bits, group, symmetric, act_order)
            name = f"b{bits}_g{group}_{'sym' if symmetric else 'asym'}_{'act' if act_order else 'seq'}"
            difference = quantized - w.astype(np.float64)
            objective = 0.5 * np.sum(difference @ h.astype(np.float64) * difference)
            tensors |= {
                f"{name}.codes": codes.astype(np.int8),
                f"{name}.scale": scale.astype(np.float32),
                f"{name}.zero": zero.astype(np.int8),
                f"{name}.margin": margin.astype(np.float16),
                f"{name}.order": order.astype(np.int64),
                f"{name}.objective": np.array([objective]),
            }
    save_file(tensors, os.path.join(os.path.dirname(os.path.abspath(__file__)), "gptq_golden.safetensors"))


if __name__ == "__main__":
    main()
