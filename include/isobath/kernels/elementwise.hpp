#pragma once
#include <ATen/core/Tensor.h>

/// Steps of a transformer block that touch each value once. Any float dtype and device; bf16 on a CPU with
/// AVX-512 BF16 and f32 on one with AVX2 take one pass over memory, elsewhere several ATen operations
/// (differentiable by autograd) do the same in f32 with the same roundings up to the last place. Local, no
/// error but shapes that do not fit.
namespace isobath::kernels {

/// weight · cast(x / √(mean(x²) + eps)): RMSNorm as transformers' Llama rounds it. x [.., d], weight [d].
[[nodiscard]] at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// residual + ∂L/∂x of `rms_norm` for ∂L/∂output `gradient`; all [.., d]. residual may be undefined (zero).
[[nodiscard]] at::Tensor rms_norm_backward(const at::Tensor& x, const at::Tensor& weight, double eps,
                                           const at::Tensor& gradient, const at::Tensor& residual);

/// silu(gate) · up, the first factor rounded to the dtype. [.., d_ff].
[[nodiscard]] at::Tensor gated(const at::Tensor& gate, const at::Tensor& up);

struct GatedGradients {
  at::Tensor gate, up;
};
/// Gradients of `gated` for ∂L/∂output `gradient`, each as its input.
[[nodiscard]] GatedGradients gated_backward(const at::Tensor& gate, const at::Tensor& up,
                                            const at::Tensor& gradient);

}  // namespace isobath::kernels
