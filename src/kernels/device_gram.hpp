#pragma once
#include <ATen/core/Tensor.h>

#include <span>

/// `kernels::add_gram_panels` and `kernels::add_product` for checked tensors of a CUDA device; one wait for
/// it. Scratch: the weighted channels of all rows, in the dtype of x.
namespace isobath::kernels::device {

[[nodiscard]] bool add_gram_panels(std::span<at::Tensor> panels, int64_t begin, const at::Tensor& x,
                                   const at::Tensor& roots);
[[nodiscard]] bool add_product(std::span<at::Tensor> panels, const at::Tensor& a, const at::Tensor& b);

}  // namespace isobath::kernels::device
