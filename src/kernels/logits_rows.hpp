#pragma once
#include <cstdint>

namespace isobath::kernels {

/// Rows of `kernels/logits.hpp`: one row of logits at a time. Value as in `ElementwiseRows`. Sums are f32
/// over some thousand values and f64 over those.
template <class Value>
struct LogitsRows {
  struct Peak {
    float value;    ///< largest logit
    int64_t index;  ///< its first place
  };
  [[nodiscard]] static Peak largest(const Value* logits, int64_t n);

  /// Σ exp(logit − peak), and to := exp(logit − peak) / that sum.
  static double softmax(const Value* logits, int64_t n, float peak, Value* to);

  struct Divergence {
    double sum_p, sum_q;  ///< Σ exp(p − peak_p), Σ exp(q − peak_q)
    double moment;        ///< Σ exp(p − peak_p) · ((p − peak_p) − (q − peak_q))
  };
  [[nodiscard]] static Divergence divergence(const Value* p, const Value* q, int64_t n, float peak_p,
                                             float peak_q);
};

extern template struct LogitsRows<float>;     // avx2/rows.cpp
extern template struct LogitsRows<uint16_t>;  // avx512/rows.cpp

}  // namespace isobath::kernels
