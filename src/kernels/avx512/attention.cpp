#include "attention.hpp"

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

constexpr int kKeyVectors = kKeyTile / kLanes;
constexpr float kLog2E = 1.44269504F;

using ScoreTile = Tile<kQueryTile, kKeyVectors>;
using OutputTile = Tile<kQueryTile, 2>;

const uint32_t* as_pairs(const uint16_t* rows) {
  return reinterpret_cast<const uint32_t*>(rows);
}

// Scores of kQueryTile queries against keys [0, n_keys): rows of scratch, stride padded.
ISOBATH_INLINE void scores(HeadShape shape, const uint16_t* queries, const uint32_t* keys, int64_t padded,
                           int64_t n_keys, float* to) {
  const int64_t n_pairs = shape.head_dim / 2;
  for (int64_t key = 0; key < n_keys; key += kKeyTile) {
    ScoreTile tile;
    tile.clear();
    tile.multiply_add(as_pairs(queries), n_pairs, 1, keys + key, padded, n_pairs);
    tile.store(to + key, padded);
  }
}

// row[0, n_keys) of scores to bf16 exp₂(scale·s − max), zero beyond n_valid; returns the sum, sets largest.
ISOBATH_INLINE float exponentials(const float* row, float scale, int64_t n_valid, int64_t n_keys,
                                  uint16_t* to, float& largest) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 maxima = lowest;
  for (int64_t key = 0; key < n_valid; key += kLanes)
    maxima = _mm512_max_ps(maxima, _mm512_mask_loadu_ps(lowest, first_lanes(n_valid - key), row + key));
  largest = _mm512_reduce_max_ps(maxima) * scale;
  const __m512 factor = _mm512_set1_ps(scale), offset = _mm512_set1_ps(-largest);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t key = 0; key < n_keys; key += kLanes) {
    const __m512 exponent = _mm512_fmadd_ps(_mm512_loadu_ps(row + key), factor, offset);
    const __m512 value = _mm512_maskz_mov_ps(first_lanes(n_valid - key), exp2(exponent));
    sums = _mm512_add_ps(sums, value);
    store_bf16(to + key, value);
  }
  return _mm512_reduce_add_ps(sums);
}

// Rotates the halves (a, b) of 16 channels by the angle of each.
ISOBATH_INLINE void turn(__m512& a, __m512& b, __m512 cos_a, __m512 sin_a, __m512 cos_b, __m512 sin_b) {
  const __m512 turned = _mm512_fnmadd_ps(b, sin_a, _mm512_mul_ps(a, cos_a));
  b = _mm512_fmadd_ps(a, sin_b, _mm512_mul_ps(b, cos_b));
  a = turned;
}

// The transpose of `turn`.
ISOBATH_INLINE void turn_back(__m512& a, __m512& b, __m512 cos_a, __m512 sin_a, __m512 cos_b, __m512 sin_b) {
  const __m512 turned = _mm512_fmadd_ps(b, sin_b, _mm512_mul_ps(a, cos_a));
  b = _mm512_fnmadd_ps(a, sin_a, _mm512_mul_ps(b, cos_b));
  a = turned;
}

}  // namespace

void gather_rows(HeadShape shape, Rows<const uint16_t> from, Angles angles, uint16_t* to) {
  const int64_t d = shape.head_dim, half = d / 2, padded = padded_length(shape.n_tokens);
  for (int64_t t = 0; t < shape.n_tokens; ++t) {
    const uint16_t* row = from.data + t * from.stride;
    for (int64_t j = 0; j < half; j += kLanes) {
      __m512 a = load_bf16(row + j), b = load_bf16(row + half + j);
      if (angles.cos != nullptr) {
        const float *cos = angles.cos + t * d + j, *sin = angles.sin + t * d + j;
        turn(a, b, _mm512_loadu_ps(cos), _mm512_loadu_ps(sin), _mm512_loadu_ps(cos + half),
             _mm512_loadu_ps(sin + half));
      }
      store_bf16(to + t * d + j, a);
      store_bf16(to + t * d + half + j, b);
    }
  }
  for (int64_t i = shape.n_tokens * d; i < padded * d; i += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_setzero_si256());
}

void pair_channels(HeadShape shape, const uint16_t* rows, uint32_t* to) {
  const int64_t n_pairs = shape.head_dim / 2, padded = padded_length(shape.n_tokens);
  const __m512i offsets =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(static_cast<int>(n_pairs)));
  for (int64_t t = 0; t < padded; t += kLanes)
    for (int64_t p = 0; p < n_pairs; ++p)
      _mm512_storeu_si512(to + p * padded + t,
                          _mm512_i32gather_epi32(offsets, as_pairs(rows) + t * n_pairs + p, 4));
}

void pair_tokens(HeadShape shape, const uint16_t* rows, uint32_t* to) {
  const int64_t d = shape.head_dim, padded = padded_length(shape.n_tokens);
  for (int64_t t = 0; t < padded; t += 2)
    for (int64_t j = 0; j < d; j += kLanes) {
      const auto load = [&](int64_t row) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + row * d + j));
      };
      _mm512_storeu_si512(to + t / 2 * d + j, pair_up(load(t), load(t + 1)));
    }
}

void attend_queries(HeadShape shape, const uint16_t* queries, const uint32_t* keys, const uint32_t* values,
                    Rows<uint16_t> out, float* log_sums, float* scratch, uint16_t* scratch_bf16) {
  const int64_t d = shape.head_dim, padded = padded_length(shape.n_tokens);
  const float scale = shape.scale * kLog2E;
  for (int64_t query = 0; query < shape.n_tokens; query += kQueryTile) {
    const int64_t n_left = shape.n_tokens - query, n_rows = n_left < kQueryTile ? n_left : kQueryTile;
    const int64_t n_keys = (query + kQueryTile + kKeyTile - 1) / kKeyTile * kKeyTile;
    scores(shape, queries + query * d, keys, padded, n_keys, scratch);
    float inverse[kQueryTile] = {};
    for (int64_t r = 0; r < kQueryTile; ++r) {
      float largest = 0;
      const float sum = exponentials(scratch + r * padded, scale, query + r + 1, n_keys,
                                     scratch_bf16 + r * padded, largest);
      inverse[r] = 1.0F / sum;
      if (r < n_rows) log_sums[query + r] = largest + std::log2(sum);
    }
    const int64_t n_pairs = (query + kQueryTile + 1) / 2;
    for (int64_t j = 0; j < d; j += 2 * kLanes) {
      OutputTile tile;
      tile.clear();
      tile.multiply_add(as_pairs(scratch_bf16), padded / 2, 1, values + j, d, n_pairs);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kQueryTile; ++r) {
        if (r >= n_rows) break;
        const __m512 factor = _mm512_set1_ps(inverse[r]);
        store_bf16(out.data + (query + r) * out.stride + j, _mm512_mul_ps(tile.sum[r][0], factor));
        store_bf16(out.data + (query + r) * out.stride + j + kLanes, _mm512_mul_ps(tile.sum[r][1], factor));
      }
    }
  }
}

int64_t backward_scratch(HeadShape shape) {
  // Scores of a tile; P and dS of a block as pairs of queries; dS of a block as rows of bf16.
  const int64_t padded = padded_length(shape.n_tokens);
  return padded * (kQueryTile + kQueryBlock / 2 + kQueryBlock / 2 + kQueryBlock / 2);
}

void attend_backward(HeadShape shape, const BackwardInputs& inputs, float* query_gradients,
                     float* key_gradients, float* value_gradients, float* scratch) {
  const int64_t d = shape.head_dim, padded = padded_length(shape.n_tokens), n_channel_pairs = d / 2;
  const __m512 exponent_scale = _mm512_set1_ps(shape.scale * kLog2E), scale = _mm512_set1_ps(shape.scale);
  auto* p_pairs = reinterpret_cast<uint32_t*>(scratch + kQueryTile * padded);
  uint32_t* ds_pairs = p_pairs + kQueryBlock / 2 * padded;
  auto* ds_rows = reinterpret_cast<uint16_t*>(ds_pairs + kQueryBlock / 2 * padded);

  for (int64_t block = 0; block < shape.n_tokens; block += kQueryBlock) {
    const int64_t n_keys = (block + kQueryBlock + kKeyTile - 1) / kKeyTile * kKeyTile;
    for (int64_t sub = 0; sub < kQueryBlock; sub += kQueryTile) {
      const int64_t query = block + sub;
      scores(shape, inputs.queries + query * d, inputs.key_channels, padded, n_keys, scratch);
      for (int64_t key = 0; key < n_keys; key += kKeyTile) {
        ScoreTile tile;  // dP = dO Vᵀ
        tile.clear();
        tile.multiply_add(as_pairs(inputs.gradients + query * d), n_channel_pairs, 1,
                          inputs.value_channels + key, padded, n_channel_pairs);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kQueryTile; r += 2) {
#pragma GCC unroll 3
          for (int64_t v = 0; v < kKeyVectors; ++v) {
            const int64_t first_key = key + v * kLanes;
            __m256i p[2], ds[2];
#pragma GCC unroll 2
            for (int64_t k = 0; k < 2; ++k) {
              const int64_t i = query + r + k;
              const __mmask16 valid = first_lanes(i < shape.n_tokens ? i + 1 - first_key : 0);
              const float log_sum = i < shape.n_tokens ? inputs.log_sums[i] : 0;
              const __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(scratch + (r + k) * padded + first_key),
                                                      exponent_scale, _mm512_set1_ps(log_sum));
              // Rounding may leave the exponent just above 0, where it is cut.
              const __m512 probability =
                  _mm512_maskz_mov_ps(valid, exp2(_mm512_min_ps(exponent, _mm512_setzero_ps())));
              const __m512 slope = _mm512_sub_ps(tile.sum[r + k][v], _mm512_set1_ps(inputs.deltas[i]));
              p[k] = narrow(probability);
              ds[k] = narrow(_mm512_mul_ps(_mm512_mul_ps(probability, slope), scale));
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_rows + (sub + r + k) * padded + first_key),
                                  ds[k]);
            }
            _mm512_storeu_si512(p_pairs + (sub + r) / 2 * padded + first_key, pair_up(p[0], p[1]));
            _mm512_storeu_si512(ds_pairs + (sub + r) / 2 * padded + first_key, pair_up(ds[0], ds[1]));
          }
        }
      }
      for (int64_t j = 0; j < d; j += 2 * kLanes) {  // dQ = dS K
        OutputTile tile;
        tile.clear();
        tile.multiply_add(as_pairs(ds_rows + sub * padded), padded / 2, 1, inputs.key_tokens + j, d,
                          (query + kQueryTile + 1) / 2);
        tile.store(query_gradients + query * d + j, d);
      }
    }
    const uint32_t* queries = inputs.query_tokens + block / 2 * d;
    const uint32_t* gradients = inputs.gradient_tokens + block / 2 * d;
    for (int64_t key = 0; key < block + kQueryBlock; key += kQueryTile) {
      for (int64_t j = 0; j < d; j += 2 * kLanes) {
        OutputTile tile;
        tile.load(value_gradients + key * d + j, d);  // dV += Pᵀ dO
        tile.multiply_add(p_pairs + key, 1, padded, gradients + j, d, kQueryBlock / 2);
        tile.store(value_gradients + key * d + j, d);
        tile.load(key_gradients + key * d + j, d);  // dK += dSᵀ Q
        tile.multiply_add(ds_pairs + key, 1, padded, queries + j, d, kQueryBlock / 2);
        tile.store(key_gradients + key * d + j, d);
      }
    }
  }
}

void scatter_rows(HeadShape shape, const float* rows, Angles angles, Rows<uint16_t> to) {
  const int64_t d = shape.head_dim, half = d / 2;
  for (int64_t t = 0; t < shape.n_tokens; ++t)
    for (int64_t j = 0; j < half; j += kLanes) {
      __m512 a = _mm512_loadu_ps(rows + t * d + j), b = _mm512_loadu_ps(rows + t * d + half + j);
      if (angles.cos != nullptr) {
        const float *cos = angles.cos + t * d + j, *sin = angles.sin + t * d + j;
        turn_back(a, b, _mm512_loadu_ps(cos), _mm512_loadu_ps(sin), _mm512_loadu_ps(cos + half),
                  _mm512_loadu_ps(sin + half));
      }
      store_bf16(to.data + t * to.stride + j, a);
      store_bf16(to.data + t * to.stride + half + j, b);
    }
}

void dot_rows(HeadShape shape, Rows<const uint16_t> a, Rows<const uint16_t> b, float* deltas) {
  for (int64_t t = 0; t < shape.n_tokens; ++t) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < shape.head_dim; j += kLanes)
      sum = _mm512_fmadd_ps(load_bf16(a.data + t * a.stride + j), load_bf16(b.data + t * b.stride + j), sum);
    deltas[t] = _mm512_reduce_add_ps(sum);
  }
  for (int64_t t = shape.n_tokens; t < padded_length(shape.n_tokens); ++t) deltas[t] = 0;
}

}  // namespace isobath::kernels::avx512
#pragma GCC pop_options
#endif
