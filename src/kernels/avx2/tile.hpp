#pragma once
#include <immintrin.h>

#include <cstdint>

#include "../lanes.hpp"

/// Register tiles and vector functions on AVX2 and FMA, f32. Included only by the sources of this folder,
/// after their `#pragma GCC target`: nothing here may be instantiated for other targets.
namespace isobath::kernels::avx2 {

inline constexpr int kLanes = 8;

/// The first n lanes, all of them from kLanes on: what masked loads and stores take.
ISOBATH_INLINE __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const int count = n >= kLanes ? kLanes : n <= 0 ? 0 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
}

/// Sums of a kRows x 8·kVectors tile of C.
template <int kRows, int kVectors>
struct Tile {
  __m256 sum[kRows][kVectors];

  ISOBATH_INLINE void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_setzero_ps();
  }
  ISOBATH_INLINE void load(const float* c, int64_t row_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_loadu_ps(c + r * row_stride + v * kLanes);
  }
  ISOBATH_INLINE void store(float* c, int64_t row_stride) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(c + r * row_stride + v * kLanes, sum[r][v]);
  }

  /// sum[r][j] += Σ_k a[r, k] · b[k, j]: value k of row r of A stands at a[r · a_row + k · a_step], value k
  /// of column j of B at b[k · b_step + j].
  ISOBATH_INLINE void multiply_add(const float* a, int64_t a_row, int64_t a_step, const float* b,
                                   int64_t b_step, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      __m256 right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = _mm256_loadu_ps(b + k * b_step + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m256 left = _mm256_broadcast_ss(a + r * a_row + k * a_step);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_fmadd_ps(left, right[v], sum[r][v]);
      }
    }
  }
};

ISOBATH_INLINE float widen(float value) {
  return value;
}
ISOBATH_INLINE float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
ISOBATH_INLINE __m256 load(const float* from) {
  return _mm256_loadu_ps(from);
}
ISOBATH_INLINE __m256 load(const uint16_t* bf16) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
/// The first n lanes; zero in the others, which are not read.
ISOBATH_INLINE __m256 load_some(const float* from, int64_t n) {
  return _mm256_maskload_ps(from, first_lanes(n));
}
ISOBATH_INLINE __m256 load_some(const uint16_t* bf16, int64_t n) {
  float values[kLanes] = {};
  for (int64_t i = 0; i < n && i < kLanes; ++i) values[i] = widen(bf16[i]);
  return _mm256_loadu_ps(values);
}
ISOBATH_INLINE void store_some(float* to, int64_t n, __m256 value) {
  _mm256_maskstore_ps(to, first_lanes(n), value);
}

/// 2^x, relative error below 2⁻²¹; below -126, 0; infinite from 127.5 on.
ISOBATH_INLINE __m256 exp2(__m256 x) {
  const __m256 underflows = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0F), _CMP_LT_OQ);
  // In this order a NaN stays one.
  const __m256 bounded = _mm256_min_ps(_mm256_set1_ps(128.0F), x);
  const __m256 whole = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 t = _mm256_sub_ps(bounded, whole);  // |t| <= 1/2
  // Taylor series to the 6th power; the next term is at most 1.2e-7.
  __m256 sum = _mm256_set1_ps(1.5403530e-4F);
  sum = _mm256_fmadd_ps(sum, t, _mm256_set1_ps(1.3333558e-3F));
  sum = _mm256_fmadd_ps(sum, t, _mm256_set1_ps(9.6181291e-3F));
  sum = _mm256_fmadd_ps(sum, t, _mm256_set1_ps(5.5504109e-2F));
  sum = _mm256_fmadd_ps(sum, t, _mm256_set1_ps(2.4022651e-1F));
  sum = _mm256_fmadd_ps(sum, t, _mm256_set1_ps(6.9314718e-1F));
  sum = _mm256_fmadd_ps(sum, t, _mm256_set1_ps(1.0F));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  return _mm256_andnot_ps(underflows, _mm256_mul_ps(sum, power));
}
ISOBATH_INLINE float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
ISOBATH_INLINE float largest_of(__m256 x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

/// Rows become columns.
ISOBATH_INLINE void transpose(__m256 (&rows)[kLanes]) {
  __m256 pairs[kLanes], fours[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 2; ++i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

}  // namespace isobath::kernels::avx2

namespace isobath::kernels {

/// f32 values, eight at a time.
template <>
struct Lanes<float> {
  using Vector = __m256;
  using Mask = __m256;
  using Places = __m256i;
  static constexpr int kCount = avx2::kLanes;

  ISOBATH_INLINE static Vector set(float value) { return _mm256_set1_ps(value); }
  ISOBATH_INLINE static Vector load(const float* from, AllLanes) { return _mm256_loadu_ps(from); }
  ISOBATH_INLINE static Vector load(const float* from, int64_t n) { return avx2::load_some(from, n); }
  ISOBATH_INLINE static void store(float* to, AllLanes, Vector value) { _mm256_storeu_ps(to, value); }
  ISOBATH_INLINE static void store(float* to, int64_t n, Vector value) { avx2::store_some(to, n, value); }
  ISOBATH_INLINE static Vector rounded(Vector value) { return value; }
  ISOBATH_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  ISOBATH_INLINE static Vector exp2(Vector x) { return avx2::exp2(x); }
  ISOBATH_INLINE static float sum(Vector x) { return avx2::sum_of(x); }
  ISOBATH_INLINE static float largest(Vector x) { return avx2::largest_of(x); }

  ISOBATH_INLINE static Mask first(int64_t n) { return _mm256_castsi256_ps(avx2::first_lanes(n)); }
  ISOBATH_INLINE static Mask is_greater(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  ISOBATH_INLINE static Vector select(Mask mask, Vector yes, Vector no) {
    return _mm256_blendv_ps(no, yes, mask);
  }
  ISOBATH_INLINE static Places select(Mask mask, Places yes, Places no) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), mask));
  }
  ISOBATH_INLINE static Places places(int first) {
    return _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  }
  ISOBATH_INLINE static void store_places(int32_t* to, Places places) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), places);
  }
};

}  // namespace isobath::kernels
