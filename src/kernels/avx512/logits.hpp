#pragma once
#include <cstdint>

/// AVX-512 parts of `kernels/logits.hpp`: one row of bf16 logits.
namespace isobath::kernels::avx512 {

struct Peak {
  float value;    ///< largest logit
  int64_t index;  ///< its first place
};
[[nodiscard]] Peak largest(const uint16_t* logits, int64_t n);

/// Σ exp(logit − peak), and to := bf16 of exp(logit − peak) / that sum.
float softmax_row(const uint16_t* logits, int64_t n, float peak, uint16_t* to);

struct Divergence {
  float sum_p, sum_q;  ///< Σ exp(p − peak_p), Σ exp(q − peak_q)
  float moment;        ///< Σ exp(p − peak_p) · ((p − peak_p) − (q − peak_q))
};
[[nodiscard]] Divergence divergence_row(const uint16_t* p, const uint16_t* q, int64_t n, float peak_p,
                                        float peak_q);

}  // namespace isobath::kernels::avx512
