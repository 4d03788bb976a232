#pragma once
#include <cstdint>

namespace isobath::kernels {

/// Rows of `kernels/elementwise.hpp`, one pass over memory each. Value is float (AVX2) or uint16_t, the bits
/// of bf16 (AVX-512 BF16); results are rounded where a bf16 tensor would be.
template <class Value>
struct ElementwiseRows {
  static void rms_norm(const Value* x, const Value* weight, int64_t d, float eps, Value* to);
  /// to := residual + the gradient of rms_norm at x for `gradient`. residual may be null (zero).
  static void rms_norm_backward(const Value* x, const Value* weight, int64_t d, float eps,
                                const Value* gradient, const Value* residual, Value* to);
  /// to := silu(gate) · up, the first factor rounded.
  static void gated(const Value* gate, const Value* up, int64_t n, Value* to);
  static void gated_backward(const Value* gate, const Value* up, const Value* gradient, int64_t n,
                             Value* gate_gradient, Value* up_gradient);
};

extern template struct ElementwiseRows<float>;     // avx2/rows.cpp
extern template struct ElementwiseRows<uint16_t>;  // avx512/rows.cpp

}  // namespace isobath::kernels
