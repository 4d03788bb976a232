#pragma once
#include <ATen/core/Tensor.h>

namespace isobath::kernels {

/// Causal attention with rotary embedding, grouped queries. Tensors are as linears leave them: q, out [b, T,
/// n_heads·head_dim], k and v [b, T, n_kv_heads·head_dim], bf16 or f32, CPU; cos and sin [>= T, head_dim]
/// f32, both halves filled, or undefined: no rotation.
struct AttentionSpec {
  int64_t n_heads = 0, n_kv_heads = 0, head_dim = 0;
  at::Tensor cos, sin;
};

struct AttentionOutput {
  at::Tensor out;  ///< [b, T, n_heads·head_dim], as q
  at::Tensor
      log_sums;  ///< [b, n_heads, T] f32: log₂ Σ exp₂ of a query's scores, what the backward pass needs
};

struct AttentionGradients {
  at::Tensor q, k, v;  ///< as the inputs
};

/// Whether `attention` takes this input on this machine; never where autograd records.
[[nodiscard]] bool has_attention(const AttentionSpec& spec, const at::Tensor& q);

/// softmax(rotate(q) rotate(k)ᵀ / √head_dim, causal) v. f32 throughout, or products of bf16 with f32 sums,
/// where probabilities are rounded to bf16 before they meet v. Local. Throws Error on shapes that do not fit.
///
/// Cost     2·b·n_heads·head_dim·T² operations at the rate of the dtype; scratch 2·b·n_kv_heads·head_dim·T
/// words.
[[nodiscard]] AttentionOutput attention(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k,
                                        const at::Tensor& v);

/// Gradients of `attention` for ∂L/∂out `gradient`, as q. Recomputes the
/// probabilities from log_sums (Dao et al. 2022, algorithm 4). Cost: 5/2 of the forward pass; one task a
/// query head; 8·T·n_heads·head_dim bytes besides the gradients.
[[nodiscard]] AttentionGradients attention_backward(const AttentionSpec& spec, const at::Tensor& q,
                                                    const at::Tensor& k, const at::Tensor& v,
                                                    const AttentionOutput& forward,
                                                    const at::Tensor& gradient);

}  // namespace isobath::kernels
