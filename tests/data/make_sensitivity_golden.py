"""Makes sensitivity_golden.safetensors: sensitivity statistics of a tiny Llama, computed in f64 with full weight gradients.

Independent of the C++ code: transformers' model, autograd's weight gradients, literal formulas. For each module:
  <module>.x [n, T, d_in] f32, <module>.gradient [n, T, d_out] f32   input and output gradient (the f64 ones, rounded)
  <module>.token_weights_<g> [n, T, g] f64                           mean of G² over each of g row groups
  <module>.xtx [d_in, d_in] f64                                      Σ x xᵀ over real tokens
  <module>.xtdx [d_in, d_in] f64                                     Σ D x xᵀ, one row group
  <module>.sum_x2, .max_abs_x, .alpha_per_token, .alpha_per_sequence [d_in] f64
and lengths [n] i32. L is the sum over predicted tokens of −ln p; padding comes after the real tokens, so its gradient is zero.
Rounding X and G to f32 moves the statistics by at most ~2e-7 relative; the test's tolerance is 1e-4.

Usage: python make_sensitivity_golden.py   (writes beside itself; made with torch 2.15, transformers 5.23, safetensors 0.8)
"""

import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = [32, 23, 28, 32]
MODULES = {
    "k": "model.layers.0.self_attn.k_proj",
    "o": "model.layers.0.self_attn.o_proj",
    "down": "model.layers.1.mlp.down_proj",
}


def make_model():
    torch.manual_seed(20260714)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.25,
        attn_implementation="eager")
    return LlamaForCausalLM(config).double().eval()


def main():
    model = make_model()
    generator = torch.Generator().manual_seed(7)
    length = max(LENGTHS)
    recorded = {}

    def record(name):
        def hook(_, inputs, output):
            output.retain_grad()
            recorded[name] = (inputs[0].detach(), output)
        return hook

    linears = {name: model.get_submodule(path) for name, path in MODULES.items()}
    for name, linear in linears.items():
        linear.register_forward_hook(record(name))

    x, gradient, weight_gradient = ({name: [] for name in MODULES} for _ in range(3))
    for real in LENGTHS:
        tokens = torch.randint(0, 97, (1, length), generator=generator)
        model.zero_grad()
        logits = model(tokens).logits[0, : real - 1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:real], reduction="sum").backward()
        for name, linear in linears.items():
            x[name].append(recorded[name][0][0])
            gradient[name].append(recorded[name][1].grad[0])
            weight_gradient[name].append(linear.weight.grad.clone())

    real_token = torch.arange(length)[None, :] < torch.tensor(LENGTHS)[:, None]
    tensors = {"lengths": np.array(LENGTHS, dtype=np.int32)}
    for name in MODULES:
        xs, gs = torch.stack(x[name]), torch.stack(gradient[name])
        assert gs[~real_token].abs().max() == 0
        x_real, g_real = xs[real_token], gs[real_token]
        d = (g_real ** 2).mean(1)
        results = {
            "xtx": x_real.T @ x_real,
            "xtdx": torch.einsum("i,ij,ik->jk", d, x_real, x_real),
            "sum_x2": (x_real ** 2).sum(0),
            "max_abs_x": x_real.abs().amax(0),
            "alpha_per_token": torch.einsum("i,ij->j", (g_real ** 2).sum(1), x_real ** 2),
            "alpha_per_sequence": sum(torch.diagonal(w.T @ w) for w in weight_gradient[name]),
        }
        for groups in (1, 2, 3):
            parts = torch.tensor_split(gs, groups, dim=2)  # the first shares hold one more, as partition() does
            results[f"token_weights_{groups}"] = torch.stack([(p ** 2).mean(2) for p in parts], dim=2)
        tensors[f"{name}.x"] = xs.float().numpy()
        tensors[f"{name}.gradient"] = gs.float().numpy()
        for key, value in results.items():
            tensors[f"{name}.{key}"] = np.ascontiguousarray(value.numpy())
    path = pathlib.Path(__file__).with_name("sensitivity_golden.safetensors")
    save_file(tensors, path)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
