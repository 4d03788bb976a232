#include "product.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "tile.hpp"

namespace isobath::kernels::avx2 {
namespace {

constexpr int kTileVectors = kPanel / kLanes;
static_assert(kTileVectors * kLanes == kPanel && kPanel % kSliver == 0);

// Two f32 of this size squared and summed over 2²⁸ tokens stay below the largest f32.
constexpr float kLargest = 1125899906842624.0F;  // 2⁵⁰

// Panel channels [8·v, 8·v + 8) of one step, where `from` holds the first n_channels of the panel.
template <class Value>
ISOBATH_INLINE __m256 load_channels(const Value* from, int v, int64_t n_channels) {
  return n_channels == kPanel ? load(from + v * kLanes)
                              : load_some(from + v * kLanes, n_channels - v * kLanes);
}

// rows x columns in registers; n_rows and n_columns cut what is written to c.
template <bool kAccumulate>
ISOBATH_INLINE void multiply_sliver(const float* sliver, const float* columns, int64_t n_steps,
                                    int64_t n_rows, int64_t n_columns, float* c, int64_t c_stride) {
  // C comes from far away: asked for now, it is there when the sums are done.
#pragma GCC unroll 4
  for (int64_t r = 0; r < kSliver; ++r) {
    if (r >= n_rows) break;
    _mm_prefetch(reinterpret_cast<const char*>(c + r * c_stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(c + r * c_stride + kPanel - 1), _MM_HINT_T0);
  }
  Tile<kSliver, kTileVectors> tile;
  tile.clear();
  tile.multiply_add(sliver, 1, kSliver, columns, kPanel, n_steps);
#pragma GCC unroll 4
  for (int64_t r = 0; r < kSliver; ++r) {
    if (r >= n_rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      float* target = c + r * c_stride + v * kLanes;
      const int64_t n_lanes = n_columns - v * kLanes;
      if (n_lanes >= kLanes) {
        const __m256 sum = tile.sum[r][v];
        _mm256_storeu_ps(target, kAccumulate ? _mm256_add_ps(_mm256_loadu_ps(target), sum) : sum);
      } else if (n_lanes > 0) {
        const __m256 sum = tile.sum[r][v];
        store_some(target, n_lanes, kAccumulate ? _mm256_add_ps(load_some(target, n_lanes), sum) : sum);
      }
    }
  }
}

template <bool kAccumulate>
ISOBATH_INLINE void multiply(const float* rows, const float* columns, int64_t n_steps, int64_t n_rows,
                             int64_t n_columns, float* c, int64_t c_stride) {
  for (int64_t row = 0; row < n_rows; row += kSliver)
    multiply_sliver<kAccumulate>(rows + row * n_steps, columns, n_steps, n_rows - row, n_columns,
                                 c + row * c_stride, c_stride);
}

template <class Value>
ISOBATH_INLINE void pack_transposed(const Value* x, int64_t channel_stride, int64_t n_steps,
                                    int64_t n_channels, float* packed) {
  for (int64_t first = 0; first < kPanel; first += kLanes) {
    const Value* from = x + first * channel_stride;
    const int64_t n_lanes = n_channels - first;
    int64_t k = 0;
    for (; k + kLanes <= n_steps; k += kLanes) {
      __m256 block[kLanes];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = i < n_lanes ? load(from + i * channel_stride + k) : _mm256_setzero_ps();
      transpose(block);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes; ++i) _mm256_storeu_ps(packed + (k + i) * kPanel + first, block[i]);
    }
    for (; k < n_steps; ++k)
      for (int64_t i = 0; i < kLanes; ++i)
        packed[k * kPanel + first + i] = i < n_lanes ? widen(from[i * channel_stride + k]) : 0.0F;
  }
}

template <class Value>
ISOBATH_INLINE void pack_straight(const Value* x, int64_t step_stride, int64_t n_steps, int64_t n_channels,
                                  float* packed) {
  for (int64_t k = 0; k < n_steps; ++k)
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v)
      _mm256_storeu_ps(packed + k * kPanel + v * kLanes, load_channels(x + k * step_stride, v, n_channels));
}

}  // namespace

bool pack_gram_panel(const float* x, int64_t row_stride, int64_t n_rows, int64_t n_channels,
                     const float* roots, float* packed) {
  float* columns = packed + kPanel * n_rows;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256 largest = _mm256_set1_ps(kLargest);
  __m256 bad = _mm256_setzero_ps();
  for (int64_t row = 0; row < n_rows; ++row) {
    const float root = roots == nullptr ? 1.0F : roots[row];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      // 0·inf is NaN: padding, whose weight is 0, may hold anything.
      const __m256 value =
          root == 0 ? _mm256_setzero_ps()
                    : _mm256_mul_ps(load_channels(x + row * row_stride, v, n_channels), _mm256_set1_ps(root));
      // Not less than or equal: true for NaN too.
      bad = _mm256_or_ps(bad, _mm256_cmp_ps(_mm256_and_ps(value, magnitude), largest, _CMP_NLE_UQ));
      _mm256_storeu_ps(columns + row * kPanel + v * kLanes, value);
      float* sliver = packed + (v * kLanes * n_rows + row * kSliver);
      _mm_storeu_ps(sliver, _mm256_castps256_ps128(value));
      _mm_storeu_ps(sliver + kSliver * n_rows, _mm256_extractf128_ps(value, 1));
    }
  }
  return _mm256_movemask_ps(bad) == 0;
}

void add_gram_tiles(const float* rows_panel, const float* columns_panel, int64_t n_steps, int64_t n_rows,
                    int64_t n_columns, float* c, int64_t c_stride) {
  multiply<true>(rows_panel, columns_panel + kPanel * n_steps, n_steps, n_rows, n_columns, c, c_stride);
}

void pack_rows(const float* x, int64_t channel_stride, int64_t n_steps, int64_t n_channels, float* packed) {
  for (int64_t first = 0; first < n_channels; first += kSliver) {
    const float* from[kSliver];
    float* to = packed + first * n_steps;
    // A missing channel repeats the first one; nothing reads what it gives.
    for (int64_t i = 0; i < kSliver; ++i)
      from[i] = x + (first + i < n_channels ? first + i : first) * channel_stride;
    int64_t k = 0;
    for (; k + kSliver <= n_steps; k += kSliver) {
      __m128 a = _mm_loadu_ps(from[0] + k), b = _mm_loadu_ps(from[1] + k), c = _mm_loadu_ps(from[2] + k),
             d = _mm_loadu_ps(from[3] + k);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + (k + 0) * kSliver, a);
      _mm_storeu_ps(to + (k + 1) * kSliver, b);
      _mm_storeu_ps(to + (k + 2) * kSliver, c);
      _mm_storeu_ps(to + (k + 3) * kSliver, d);
    }
    for (; k < n_steps; ++k)
      for (int64_t i = 0; i < kSliver; ++i) to[k * kSliver + i] = from[i][k];
  }
}

void pack_columns(const float* x, int64_t channel_stride, int64_t n_steps, int64_t n_channels,
                  float* packed) {
  pack_transposed(x, channel_stride, n_steps, n_channels, packed);
}
void pack_columns(const uint16_t* x, int64_t channel_stride, int64_t n_steps, int64_t n_channels,
                  float* packed) {
  pack_transposed(x, channel_stride, n_steps, n_channels, packed);
}

void pack_columns_of_rows(const float* x, int64_t step_stride, int64_t n_steps, int64_t n_channels,
                          float* packed) {
  pack_straight(x, step_stride, n_steps, n_channels, packed);
}
void pack_columns_of_rows(const uint16_t* x, int64_t step_stride, int64_t n_steps, int64_t n_channels,
                          float* packed) {
  pack_straight(x, step_stride, n_steps, n_channels, packed);
}

void multiply_panels(const float* rows, const float* columns, int64_t n_steps, int64_t n_rows,
                     int64_t n_columns, float* c, int64_t c_stride, bool accumulate) {
  if (accumulate)
    multiply<true>(rows, columns, n_steps, n_rows, n_columns, c, c_stride);
  else
    multiply<false>(rows, columns, n_steps, n_rows, n_columns, c, c_stride);
}

}  // namespace isobath::kernels::avx2
#pragma GCC pop_options
#endif
