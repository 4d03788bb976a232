#include "elementwise.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
// GCC 12 sees its own intrinsics so.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "tile.hpp"

namespace isobath::kernels::avx512 {
namespace {

ISOBATH_INLINE void store_some(uint16_t* to, __mmask16 lanes, __m512 value) {
  _mm256_mask_storeu_epi16(to, lanes, narrow(value));
}
ISOBATH_INLINE __m512 rounded(__m512 value) {
  return widen(narrow(value));
}

ISOBATH_INLINE float inverse_rms(const uint16_t* x, int64_t d, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t j = 0; j < d; j += kLanes) {
    const __m512 value = load_bf16(x + j, first_lanes(d - j));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  return 1.0F / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(d) + eps);
}

ISOBATH_INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0F);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504F)))));
}

}  // namespace

void rms_norm_row(const uint16_t* x, const uint16_t* weight, int64_t d, float eps, uint16_t* to) {
  const __m512 scale = _mm512_set1_ps(inverse_rms(x, d, eps));
  for (int64_t j = 0; j < d; j += kLanes) {
    const __mmask16 lanes = first_lanes(d - j);
    const __m512 unit = rounded(_mm512_mul_ps(load_bf16(x + j, lanes), scale));
    store_some(to + j, lanes, _mm512_mul_ps(load_bf16(weight + j, lanes), unit));
  }
}

void rms_norm_backward_row(const uint16_t* x, const uint16_t* weight, int64_t d, float eps,
                           const uint16_t* gradient, const uint16_t* residual, uint16_t* to) {
  const float inverse = inverse_rms(x, d, eps);
  const __m512 scale = _mm512_set1_ps(inverse);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t j = 0; j < d; j += kLanes) {
    const __mmask16 lanes = first_lanes(d - j);
    const __m512 g = _mm512_mul_ps(load_bf16(gradient + j, lanes), load_bf16(weight + j, lanes));
    sums = _mm512_fmadd_ps(g, load_bf16(x + j, lanes), sums);
  }
  // mean(g · unit) · unit = Σ g x · scale² / d · x
  const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sums) * inverse * inverse / static_cast<float>(d));
  for (int64_t j = 0; j < d; j += kLanes) {
    const __mmask16 lanes = first_lanes(d - j);
    const __m512 g = _mm512_mul_ps(load_bf16(gradient + j, lanes), load_bf16(weight + j, lanes));
    const __m512 across = _mm512_fnmadd_ps(load_bf16(x + j, lanes), along, g);
    store_some(to + j, lanes, _mm512_fmadd_ps(across, scale, load_bf16(residual + j, lanes)));
  }
}

void gated_row(const uint16_t* gate, const uint16_t* up, int64_t n, uint16_t* to) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 g = load_bf16(gate + j, lanes);
    store_some(to + j, lanes, _mm512_mul_ps(rounded(_mm512_mul_ps(g, sigmoid(g))), load_bf16(up + j, lanes)));
  }
}

void gated_backward_row(const uint16_t* gate, const uint16_t* up, const uint16_t* gradient, int64_t n,
                        uint16_t* gate_gradient, uint16_t* up_gradient) {
  const __m512 one = _mm512_set1_ps(1.0F);
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 lanes = first_lanes(n - j);
    const __m512 g = load_bf16(gate + j, lanes), u = load_bf16(up + j, lanes),
                 d = load_bf16(gradient + j, lanes);
    const __m512 s = sigmoid(g);
    store_some(up_gradient + j, lanes, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
    // silu'(g) = s (1 + g (1 − s))
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
    store_some(gate_gradient + j, lanes, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
  }
}

}  // namespace isobath::kernels::avx512
#pragma GCC pop_options
#endif
