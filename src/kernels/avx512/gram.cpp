#include "gram.hpp"

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

constexpr int kTileRows = 8, kTileVectors = 3;
static_assert(kTileVectors * kLanes == kGramPanel && kGramPanel % kTileRows == 0);

// Pairs of 16 channels of two tokens. Sets bad where a value is infinite or NaN.
ISOBATH_INLINE __m512i weigh(const uint16_t* first, const uint16_t* second, __mmask16 channels,
                             float first_root, float second_root, __m512i& bad) {
  const auto masked = [&](const uint16_t* from, float root) {
    // 0·inf is NaN: padding, whose weight is 0, may hold anything.
    if (from == nullptr || root == 0) return _mm256_setzero_si256();
    const __m256i raw = _mm256_maskz_loadu_epi16(channels, from);
    return root == 1 ? raw : narrow(_mm512_mul_ps(widen(raw), _mm512_set1_ps(root)));
  };
  const __m512i pairs = pair_up(masked(first, first_root), masked(second, second_root));
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  const __mmask32 is_bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
  bad = _mm512_mask_or_epi32(bad, is_bad != 0 ? 0xffff : 0, bad, _mm512_set1_epi32(1));
  return pairs;
}

}  // namespace

bool pack_gram_panel(const uint16_t* x, int64_t row_stride, int64_t n_rows, int64_t n_channels,
                     const float* roots, uint32_t* packed) {
  __m512i bad = _mm512_setzero_si512();
  for (int64_t row = 0; row < n_rows; row += 2) {
    const uint16_t* first = x + row * row_stride;
    const uint16_t* second = row + 1 < n_rows ? first + row_stride : nullptr;
    const float first_root = roots == nullptr ? 1.0F : roots[row];
    const float second_root = roots == nullptr || second == nullptr ? 1.0F : roots[row + 1];
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t channel = v * kLanes;
      const __mmask16 mask = first_lanes(n_channels - channel);
      const __m512i pairs = weigh(first + channel, second == nullptr ? nullptr : second + channel, mask,
                                  first_root, second_root, bad);
      _mm512_storeu_si512(packed + row / 2 * kGramPanel + channel, pairs);
    }
  }
  return _mm512_test_epi32_mask(bad, bad) == 0;
}

void add_gram_tiles(const uint32_t* rows_panel, const uint32_t* columns_panel, int64_t n_pairs,
                    int64_t n_rows, int64_t n_columns, float* c, int64_t c_stride) {
  for (int64_t row = 0; row < n_rows; row += kTileRows) {
    Tile<kTileRows, kTileVectors> tile;
    tile.clear();
    tile.multiply_add(rows_panel + row, 1, kGramPanel, columns_panel, kGramPanel, n_pairs);
    const int64_t n_full = n_rows - row < kTileRows ? n_rows - row : kTileRows;
    for (int64_t r = 0; r < n_full; ++r) {
      float* target = c + (row + r) * c_stride;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const __mmask16 mask = first_lanes(n_columns - v * kLanes);
        const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, target + v * kLanes), tile.sum[r][v]);
        _mm512_mask_storeu_ps(target + v * kLanes, mask, sum);
      }
    }
  }
}

}  // namespace isobath::kernels::avx512
#pragma GCC pop_options
#endif
