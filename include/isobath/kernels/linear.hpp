#pragma once
#include <ATen/core/Tensor.h>

/// Products with frozen weights. f32 activations on a CPU with AVX2 go through panels packed for it, which
/// widen bf16 weights on the way, so that weights may stay as the checkpoint has them; everything else is
/// ATen's (differentiable by autograd). f32 sums are made in one order, whatever the threads. Local.
namespace isobath::kernels {

/// y = x Wᵀ + bias. x [.., d_in], weight [d_out, d_in] in x's dtype or bf16, bias [d_out] or undefined ->
/// [.., d_out] in x's dtype.
[[nodiscard]] at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& bias);

/// ∂L/∂x of `linear_forward` for ∂L/∂y `gradient` [.., d_out] -> [.., d_in].
[[nodiscard]] at::Tensor linear_backward(const at::Tensor& gradient, const at::Tensor& weight);

/// sum += linear_backward(gradient, weight), for linears that share x. sum [.., d_in], contiguous.
void add_linear_backward(at::Tensor& sum, const at::Tensor& gradient, const at::Tensor& weight);

}  // namespace isobath::kernels
