#pragma once
#include <ATen/ATen.h>

namespace isobath::sensitivity::testing {

/// max |a − b| / max |b|: the error of a statistic relative to the largest channel, on which rankings and H
/// depend.
inline double relative_error(const at::Tensor& found, const at::Tensor& expected) {
  const at::Tensor b = expected.to(at::kDouble);
  return ((found.to(at::kDouble) - b).abs().max() / b.abs().max()).item<double>();
}

}  // namespace isobath::sensitivity::testing
