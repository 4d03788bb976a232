#pragma once
#include <ATen/ATen.h>

/// What the tests of Gram kernels, on the CPU and for devices, compare with.
namespace isobath::kernels {

/// What add_gram promises, in f64, rounding included.
inline at::Tensor literal_gram(const at::Tensor& x, const at::Tensor& roots) {
  at::Tensor rounded = x;
  if (roots.defined()) rounded = (x.to(at::kFloat) * roots.unsqueeze(1)).to(x.scalar_type());
  const at::Tensor wide = rounded.to(at::kDouble);
  return wide.t().mm(wide);
}

inline double relative(const at::Tensor& found, const at::Tensor& expected) {
  return ((found - expected).norm() / expected.norm()).item<double>();
}

}  // namespace isobath::kernels
