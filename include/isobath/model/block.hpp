#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <isobath/kernels/attention.hpp>
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
  at::Tensor q_norm, k_norm;       ///< [head_dim]; undefined without ModelConfig::head_norms
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

/// y = x Wᵀ + bias. x [.., d_in] -> [.., d_out].
[[nodiscard]] at::Tensor apply_linear(const at::Tensor& x, const Linear& linear);

// The steps of a block, so that the quantization pass can stop between input sets. The norms and the gate are
// `kernels::rms_norm` and `kernels::gated`.

/// The norms of heads where the model has them, rotary embedding and causal attention. q [b, T,
/// n_heads*head_dim], k and v [b, T, n_kv_heads*head_dim] -> out [b, T, n_heads*head_dim].
/// `kernels::attention` where the machine has it, otherwise SDPA and undefined log_sums; the latter is
/// differentiable by autograd.
[[nodiscard]] kernels::AttentionOutput attend(const ModelConfig& config, const Rotary& rotary,
                                              const BlockWeights& weights, const at::Tensor& q,
                                              const at::Tensor& k, const at::Tensor& v);
/// Gradients of `attend` for ∂L/∂out. `forward` is what it returned for these inputs.
[[nodiscard]] kernels::AttentionGradients attend_backward(const ModelConfig& config, const Rotary& rotary,
                                                          const BlockWeights& weights, const at::Tensor& q,
                                                          const at::Tensor& k, const at::Tensor& v,
                                                          const kernels::AttentionOutput& forward,
                                                          const at::Tensor& gradient);

/// What the backward pass of a block needs of its forward pass; compute dtype, [b, T, ..] each.
struct BlockActivations {
  at::Tensor input;                   ///< of the block
  at::Tensor q, k, v;                 ///< before norms of heads and rotation
  kernels::AttentionOutput attended;  ///< input of o, and log_sums
  at::Tensor middle;                  ///< after the first residual sum
  at::Tensor gate, up;

  /// Only the input: the rest is to be recomputed.
  [[nodiscard]] static BlockActivations of_input(const at::Tensor& input) {
    BlockActivations activations;
    activations.input = input;
    return activations;
  }
};

/// Bytes of BlockActivations for b x T tokens, beyond the input.
[[nodiscard]] int64_t activation_bytes(const ModelConfig& config, int64_t n_tokens, int64_t element_size);

/// The whole block: x [b, T, d_model] -> [b, T, d_model]. Fills `keep` when given.
[[nodiscard]] at::Tensor block_forward(const ModelConfig& config, const Rotary& rotary,
                                       const BlockWeights& weights, const at::Tensor& x,
                                       BlockActivations* keep = nullptr);

/// Receives a linear's input x [b, T, d_in] and output gradient [b, T, d_out], compute dtype.
using OnLinearGradient =
    std::function<void(Projection projection, const at::Tensor& x, const at::Tensor& gradient)>;

/// ∂L/∂input for ∂L/∂output `gradient` [b, T, d_model]; weights are frozen: no weight gradients. Calls
/// `observe` for the seven linears from down to q. May be called again for another gradient of the same
/// activations.
///
/// Cost     one product a linear, attention 5/2 of its forward, and no recomputation of products.
[[nodiscard]] at::Tensor block_backward(const ModelConfig& config, const Rotary& rotary,
                                        const BlockWeights& weights, const BlockActivations& activations,
                                        const at::Tensor& gradient, const OnLinearGradient& observe);

}  // namespace isobath::model
