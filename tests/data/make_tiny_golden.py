#!/usr/bin/env python3
"""Makes tests/data/tiny_*: tiny Hugging Face models of every supported architecture and what transformers computes with them.

Each directory gets config.json, model.safetensors (tiny_llama_b: f32, the others: bf16) and golden.safetensors, which holds what
the f32 model computes with the stored weights:
  tokens                 [b, T] i32
  logits                 [b, T, vocab]
  nll_sum                [1] f64: sum over the predicted tokens of the loss
  gradient.hidden        [b, T, d_model]: of nll_sum at the last block's output
  gradient.<module>      [b, T, d_out]: of nll_sum at the output of every linear of a block, by autograd
  frequencies            [head_dim / 2]: inverse frequencies of the rotary embedding

Usage: .venv/bin/python tests/data/make_tiny_golden.py [NAME ...]   (writes beside itself; versions go into the metadata)
"""

import copy
import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short enough that the wavelengths of head_dim 16 fall on both sides and between.
    "original_max_position_embeddings": 256,
}
COMMON = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
              max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.15)
VARIANTS = {
    # The spelling of configurations before transformers 5: rope_theta beside rope_scaling, torch_dtype.
    "llama_a": dict(config=dict(num_hidden_layers=3, rope_parameters=LLAMA3_SCALING | {"rope_theta": 10000.0},
                          tie_word_embeddings=False, **COMMON), stored=torch.bfloat16, old_spelling=True, seed=1),
    "llama_b": dict(config=dict(num_hidden_layers=2, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
                          tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **COMMON),
              stored=torch.float32, old_spelling=False, seed=2),
    # As published: no window (sliding_window: null), rope_theta at the top.
    "mistral": dict(kind="Mistral", config=dict(num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                                                sliding_window=None, **COMMON),
                    stored=torch.bfloat16, old_spelling=True, seed=3),
    # Biases of q, k and v alone; a window that is not used.
    "qwen2": dict(kind="Qwen2", config=dict(num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                                            tie_word_embeddings=True, use_sliding_window=False, sliding_window=4, **COMMON),
                  stored=torch.bfloat16, old_spelling=True, seed=4),
    # Norms of heads, and heads that are wider than d_model / n_heads.
    "qwen3": dict(kind="Qwen3", config=dict(num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                                            head_dim=32, tie_word_embeddings=False, **COMMON),
                  stored=torch.bfloat16, old_spelling=False, seed=5),
}
N_SEQUENCES, LENGTH = 2, 10


def spell_as_before_version_5(path):
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def prepare_weights(model, stored, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers starts norms at 1 and biases at 0, where mistakes with them do not show.
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.to(stored))


def golden_of(model, tokens):
    golden = {"tokens": tokens.to(torch.int32)}
    kept = {}

    def keep(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            output.retain_grad()
            kept[name] = output
        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(keep(name))
    model.model.layers[-1].register_forward_hook(keep("hidden"))
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1),
                                             reduction="sum")
    loss.backward()
    golden["logits"] = logits.detach()
    golden["nll_sum"] = loss.detach().double().reshape(1)
    golden["frequencies"] = model.model.rotary_emb.inv_freq.clone()
    golden |= {f"gradient.{name}": output.grad for name, output in kept.items()}
    return {name: tensor.contiguous() for name, tensor in golden.items()}


def main():
    here = pathlib.Path(__file__).parent
    torch.set_num_threads(1)
    for name in sys.argv[1:] or VARIANTS:
        variant, directory = VARIANTS[name], here / f"tiny_{name}"
        kind = variant.get("kind", "Llama")
        torch.manual_seed(variant["seed"])
        generator = torch.Generator().manual_seed(variant["seed"])
        config = getattr(transformers, f"{kind}Config")(**variant["config"])
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
        prepare_weights(model, variant["stored"], generator)
        copy.deepcopy(model).to(variant["stored"]).save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        if variant["old_spelling"]:
            spell_as_before_version_5(directory / "config.json")
        tokens = torch.randint(0, 256, (N_SEQUENCES, LENGTH), generator=generator)
        golden = golden_of(model, tokens)
        safetensors.torch.save_file(golden, directory / "golden.safetensors", metadata={
            "made_by": "tests/data/make_tiny_golden.py", "torch": torch.__version__,
            "transformers": transformers.__version__})
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{directory.name}: nll/token {golden['nll_sum'].item() / (N_SEQUENCES * (LENGTH - 1)):.4f}, {size} bytes")


if __name__ == "__main__":
    main()
