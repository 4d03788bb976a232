#pragma once
#include <ATen/core/Tensor.h>

#include <functional>

namespace isobath::sensitivity {

/// Called in the backward pass of a recorded linear with its input and its output gradient.
/// x [b, T, d_in], gradient [b, T, d_out], compute dtype.
using OnBackward = std::function<void(const at::Tensor& x, const at::Tensor& gradient)>;

/// y = x Wᵀ + bias whose backward computes ∂L/∂x only (weights are frozen: no weight gradient) and reports
/// (x, ∂L/∂y). An autograd function. x must require grad for the backward to run; with retain_graph it may
/// run several times. The result must not be changed in place before the backward. An error thrown by the
/// callback leaves `backward`. Keeps x until the backward.
[[nodiscard]] at::Tensor recording_linear(const at::Tensor& x, const at::Tensor& weight,
                                          const at::Tensor& bias, OnBackward on_backward);

}  // namespace isobath::sensitivity
