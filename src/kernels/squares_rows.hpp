#pragma once
#include <cstdint>

namespace isobath::kernels {

/// Rows of `kernels/squares.hpp`. Value as in `ElementwiseRows`.
template <class Value>
struct SquaresRows {
  [[nodiscard]] static float sum(const Value* x, int64_t n);

  /// Of n_rows rows of x, `stride` apart, for each of n channels: += Σ x², += Σ weight · x², the larger of
  /// what stands there and |x|. One f32 sum over all rows is added.
  static void channels(const Value* x, int64_t stride, const float* weights, int64_t n_rows, int64_t n,
                       double* plain, double* weighted, float* largest);
};

extern template struct SquaresRows<float>;     // avx2/rows.cpp
extern template struct SquaresRows<uint16_t>;  // avx512/rows.cpp

}  // namespace isobath::kernels
