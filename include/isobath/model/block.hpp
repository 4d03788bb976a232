#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <isobath/model/model_config.hpp>

namespace isobath::model {

struct Linear {
  at::Tensor weight;  ///< [d_out, d_in]
  at::Tensor bias;    ///< [d_out], or undefined
};

/// Weights of one transformer block, on one device, in compute dtype.
struct BlockWeights {
  at::Tensor input_norm;           ///< [d_model]
  at::Tensor post_attention_norm;  ///< [d_model]
  std::array<Linear, kProjections> linears;
  [[nodiscard]] Linear& operator[](Projection p) { return linears[static_cast<int>(p)]; }
  [[nodiscard]] const Linear& operator[](Projection p) const { return linears[static_cast<int>(p)]; }
};

/// cos and sin of the rotary embedding for positions [0, length): f32 [length, head_dim] each, computed as
/// transformers does (f32 inverse frequencies), cast to the compute dtype when applied.
struct Rotary {
  at::Tensor cos, sin;
  static Rotary make(const ModelConfig& config, int64_t length, c10::Device device);
};

/// How a linear is applied: the plain product, or one that records (sensitivity), or one that quantizes
/// first. x [b, T, d_in] -> [b, T, d_out].
using ApplyLinear = std::function<at::Tensor(Projection, const at::Tensor& x, const Linear& linear)>;

/// y = x Wᵀ + bias.
[[nodiscard]] at::Tensor apply_linear(const at::Tensor& x, const Linear& linear);

// The steps of a block, so that the quantization pass can stop between input sets. All differentiable by
// autograd.

/// RMSNorm as Llama does it: f32 inside, cast back before the product with the weight. x [b, T, d_model].
[[nodiscard]] at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
/// Rotary embedding and causal attention. q [b, T, n_heads*head_dim], k and v [b, T, n_kv_heads*head_dim] ->
/// [b, T, n_heads*head_dim].
[[nodiscard]] at::Tensor attend(const ModelConfig& config, const Rotary& rotary, const at::Tensor& q,
                                const at::Tensor& k, const at::Tensor& v);
/// silu(gate) * up.
[[nodiscard]] at::Tensor gated(const at::Tensor& gate, const at::Tensor& up);

/// The whole block: x [b, T, d_model] -> [b, T, d_model].
[[nodiscard]] at::Tensor block_forward(const ModelConfig& config, const Rotary& rotary,
                                       const BlockWeights& weights, const at::Tensor& x,
                                       const ApplyLinear& linear);

}  // namespace isobath::model
