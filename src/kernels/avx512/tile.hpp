#pragma once
#include <immintrin.h>

#include <cstdint>

#include "../lanes.hpp"

/// Register tiles on the AVX-512 BF16 dot product. Included only by the sources of this folder, after their
/// `#pragma GCC target`: nothing here may be instantiated for other targets.
///
/// A "pair" is two bf16 values that follow one another along the summed dimension, in one 32-bit word: what
/// one lane of VDPBF16PS multiplies and adds to an f32 sum.
namespace isobath::kernels::avx512 {

inline constexpr int kLanes = 16;

/// Sums of a kRows x 16·kVectors tile of C.
template <int kRows, int kVectors>
struct Tile {
  __m512 sum[kRows][kVectors];

  ISOBATH_INLINE void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  ISOBATH_INLINE void load(const float* c, int64_t row_stride) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_loadu_ps(c + r * row_stride + v * kLanes);
  }
  ISOBATH_INLINE void store(float* c, int64_t row_stride) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * row_stride + v * kLanes, sum[r][v]);
  }

  /// sum[r][j] += Σ_p a[r, p] · b[p, j]: pair p of row r of A stands at a[r · a_row + p · a_pair], pair p of
  /// column j of B at b[p · b_pair + j].
  ISOBATH_INLINE void multiply_add(const uint32_t* a, int64_t a_row, int64_t a_pair, const uint32_t* b,
                                   int64_t b_pair, int64_t n_pairs) {
    for (int64_t p = 0; p < n_pairs; ++p) {
      __m512i right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = _mm512_loadu_si512(b + p * b_pair + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const __m512i left = _mm512_set1_epi32(static_cast<int>(a[r * a_row + p * a_pair]));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], reinterpret_cast<__m512bh>(left),
                                       reinterpret_cast<__m512bh>(right[v]));
      }
    }
  }
};

ISOBATH_INLINE __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
/// To nearest, ties to even; subnormals become zero.
ISOBATH_INLINE __m256i narrow(__m512 f32) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(f32));
}
ISOBATH_INLINE __m512 load_bf16(const uint16_t* from) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
ISOBATH_INLINE void store_bf16(uint16_t* to, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value));
}
/// The first n lanes, all of them from kLanes on.
ISOBATH_INLINE __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= kLanes ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}
/// Zero in the other lanes, which are not read.
ISOBATH_INLINE __m512 load_bf16(const uint16_t* from, __mmask16 lanes) {
  return widen(_mm256_maskz_loadu_epi16(lanes, from));
}
/// Lane j: the pair (first[j], second[j]).
ISOBATH_INLINE __m512i pair_up(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

/// 2^x, relative error below 2⁻²²; below -126, 0; infinite where 2^x overflows.
ISOBATH_INLINE __m512 exp2(__m512 x) {
  const __mmask16 underflows = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0F), _CMP_LT_OQ);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 t = _mm512_sub_ps(x, whole);  // |t| <= 1/2
  // Taylor series to the 6th power; the next term is at most 1.2e-7.
  __m512 sum = _mm512_set1_ps(1.5403530e-4F);
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.3333558e-3F));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(9.6181291e-3F));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(5.5504109e-2F));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(2.4022651e-1F));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(6.9314718e-1F));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.0F));
  return _mm512_mask_mov_ps(_mm512_scalef_ps(sum, whole), underflows, _mm512_setzero_ps());
}

}  // namespace isobath::kernels::avx512

namespace isobath::kernels {

/// bf16 values, sixteen at a time, computed with in f32.
template <>
struct Lanes<uint16_t> {
  using Vector = __m512;
  using Mask = __mmask16;
  using Places = __m512i;
  static constexpr int kCount = avx512::kLanes;

  ISOBATH_INLINE static Vector set(float value) { return _mm512_set1_ps(value); }
  ISOBATH_INLINE static Vector load(const uint16_t* from, AllLanes) { return avx512::load_bf16(from); }
  ISOBATH_INLINE static Vector load(const uint16_t* from, int64_t n) {
    return avx512::load_bf16(from, avx512::first_lanes(n));
  }
  ISOBATH_INLINE static void store(uint16_t* to, AllLanes, Vector value) { avx512::store_bf16(to, value); }
  ISOBATH_INLINE static void store(uint16_t* to, int64_t n, Vector value) {
    _mm256_mask_storeu_epi16(to, avx512::first_lanes(n), avx512::narrow(value));
  }
  ISOBATH_INLINE static Vector rounded(Vector value) { return avx512::widen(avx512::narrow(value)); }
  ISOBATH_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  ISOBATH_INLINE static Vector exp2(Vector x) { return avx512::exp2(x); }
  ISOBATH_INLINE static float sum(Vector x) { return _mm512_reduce_add_ps(x); }
  ISOBATH_INLINE static float largest(Vector x) { return _mm512_reduce_max_ps(x); }

  ISOBATH_INLINE static Mask first(int64_t n) { return avx512::first_lanes(n); }
  ISOBATH_INLINE static Mask is_greater(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  ISOBATH_INLINE static Vector select(Mask mask, Vector yes, Vector no) {
    return _mm512_mask_mov_ps(no, mask, yes);
  }
  ISOBATH_INLINE static Places select(Mask mask, Places yes, Places no) {
    return _mm512_mask_mov_epi32(no, mask, yes);
  }
  ISOBATH_INLINE static Places places(int first) {
    return _mm512_add_epi32(_mm512_set1_epi32(first),
                            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  }
  ISOBATH_INLINE static void store_places(int32_t* to, Places places) { _mm512_storeu_si512(to, places); }
};

}  // namespace isobath::kernels
