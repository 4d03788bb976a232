#pragma once
#include <ATen/core/Tensor.h>

namespace isobath::pipeline {

/// What the original model has in the place of an input; undefined when it does not travel along.
struct Original {
  at::Tensor input;  ///< X̃ [b, T, d_in], or of rows [n, d_in]
  /// R = r̃ − r [b, T, d_model], or of rows, f32: what the residual stream of the quantized prefix lacks where
  /// the linears of the set are added to it. Undefined for other sets and without residual correction.
  at::Tensor residual;
};

}  // namespace isobath::pipeline
