#include "logits.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
// GCC 12 sees its own intrinsics so.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "tile.hpp"

namespace isobath::kernels::avx512 {
namespace {

constexpr float kLowest = -3.4028235e38F;
constexpr float kLog2E = 1.44269504F;

}  // namespace

Peak largest(const uint16_t* logits, int64_t n) {
  const __m512 lowest = _mm512_set1_ps(kLowest);
  __m512 maxima = lowest;
  __m512i places = _mm512_setzero_si512();
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 value = _mm512_mask_mov_ps(lowest, lanes, load_bf16(logits + j, lanes));
    const __mmask16 is_larger = _mm512_cmp_ps_mask(value, maxima, _CMP_GT_OQ);
    maxima = _mm512_mask_mov_ps(maxima, is_larger, value);
    places = _mm512_mask_add_epi32(places, is_larger, lane, _mm512_set1_epi32(static_cast<int>(j)));
  }
  const float peak = _mm512_reduce_max_ps(maxima);
  const __mmask16 at_peak = _mm512_cmp_ps_mask(maxima, _mm512_set1_ps(peak), _CMP_EQ_OQ);
  return {peak, _mm512_mask_reduce_min_epi32(at_peak, places)};
}

float softmax_row(const uint16_t* logits, int64_t n, float peak, uint16_t* to) {
  const __m512 scale = _mm512_set1_ps(kLog2E), offset = _mm512_set1_ps(-peak * kLog2E);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 value = exp2(_mm512_fmadd_ps(load_bf16(logits + j, lanes), scale, offset));
    sums = _mm512_mask_add_ps(sums, lanes, sums, value);
  }
  const float sum = _mm512_reduce_add_ps(sums);
  const __m512 inverse = _mm512_set1_ps(1.0F / sum);
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 value = exp2(_mm512_fmadd_ps(load_bf16(logits + j, lanes), scale, offset));
    _mm256_mask_storeu_epi16(to + j, lanes, narrow(_mm512_mul_ps(value, inverse)));
  }
  return sum;
}

Divergence divergence_row(const uint16_t* p, const uint16_t* q, int64_t n, float peak_p, float peak_q) {
  const __m512 scale = _mm512_set1_ps(kLog2E), from_p = _mm512_set1_ps(peak_p),
               from_q = _mm512_set1_ps(peak_q);
  __m512 sums_p = _mm512_setzero_ps(), sums_q = sums_p, moments = sums_p;
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 below_p = _mm512_sub_ps(load_bf16(p + j, lanes), from_p);
    const __m512 below_q = _mm512_sub_ps(load_bf16(q + j, lanes), from_q);
    const __m512 weight_p = exp2(_mm512_mul_ps(below_p, scale));
    sums_p = _mm512_mask_add_ps(sums_p, lanes, sums_p, weight_p);
    sums_q = _mm512_mask_add_ps(sums_q, lanes, sums_q, exp2(_mm512_mul_ps(below_q, scale)));
    moments = _mm512_mask3_fmadd_ps(weight_p, _mm512_sub_ps(below_p, below_q), moments, lanes);
  }
  return {_mm512_reduce_add_ps(sums_p), _mm512_reduce_add_ps(sums_q), _mm512_reduce_add_ps(moments)};
}

}  // namespace isobath::kernels::avx512
#pragma GCC pop_options
#endif
