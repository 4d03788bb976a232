#include "attention.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "tile.hpp"

namespace isobath::kernels::avx2 {
namespace {

constexpr int kColumnVectors = kKeyTile / kLanes;
constexpr float kLog2E = 1.44269504F;

using HeadTile = Tile<kQueryTile, kColumnVectors>;

// Products of kQueryTile rows [.., head_dim] with packed keys [0, n_keys): to, stride kKeyBlock.
ISOBATH_INLINE void scores(int64_t head_dim, const float* rows, const float* packed, int64_t n_keys,
                           float* to) {
  for (int64_t key = 0; key < n_keys; key += kKeyTile) {
    HeadTile tile;
    tile.clear();
    tile.multiply_add(rows, head_dim, 1, packed + key * head_dim, kKeyTile, head_dim);
    tile.store(to + key, kKeyBlock);
  }
}

// Keys of the block from `key` on that any of the queries [query, query + kQueryTile) sees, in whole tiles.
ISOBATH_INLINE int64_t visible_keys(int64_t query, int64_t key) {
  const int64_t n = query + kQueryTile - key;
  const int64_t tiles = n <= 0 ? 0 : (n + kKeyTile - 1) / kKeyTile;
  return tiles * kKeyTile < kKeyBlock ? tiles * kKeyTile : kKeyBlock;
}

// The softmax of one query over the blocks of keys so far.
struct Running {
  float largest = -INFINITY;  // of the scaled scores, in powers of 2
  float sum = 0;              // Σ exp₂(score − largest)
};

// row[0, n_keys) of scores := exp₂(scale·s − largest), zero beyond n_valid. Returns what older sums shrink
// by.
ISOBATH_INLINE float exponentials(float* row, float scale, int64_t n_valid, int64_t n_keys, Running& so_far) {
  const __m256 lowest = _mm256_set1_ps(-INFINITY);
  __m256 maxima = lowest;
  for (int64_t key = 0; key < n_keys; key += kLanes) {
    const __m256 valid = _mm256_castsi256_ps(first_lanes(n_valid - key));
    maxima = _mm256_max_ps(maxima, _mm256_blendv_ps(lowest, load(row + key), valid));
  }
  const float here = largest_of(maxima) * scale;
  const float largest = here > so_far.largest ? here : so_far.largest;
  const __m256 factor = _mm256_set1_ps(scale), offset = _mm256_set1_ps(largest);
  __m256 sums = _mm256_setzero_ps();
  for (int64_t key = 0; key < n_keys; key += kLanes) {
    const __m256 valid = _mm256_castsi256_ps(first_lanes(n_valid - key));
    const __m256 value = _mm256_and_ps(valid, exp2(_mm256_fmsub_ps(load(row + key), factor, offset)));
    sums = _mm256_add_ps(sums, value);
    _mm256_storeu_ps(row + key, value);
  }
  const float shrink = so_far.sum == 0 ? 0 : std::exp2(so_far.largest - largest);
  so_far = {largest, so_far.sum * shrink + sum_of(sums)};
  return shrink;
}

// Rotates the halves (a, b) of 8 channels by the angle of each.
ISOBATH_INLINE void turn(__m256& a, __m256& b, __m256 cos_a, __m256 sin_a, __m256 cos_b, __m256 sin_b) {
  const __m256 turned = _mm256_fnmadd_ps(b, sin_a, _mm256_mul_ps(a, cos_a));
  b = _mm256_fmadd_ps(a, sin_b, _mm256_mul_ps(b, cos_b));
  a = turned;
}

// The transpose of `turn`.
ISOBATH_INLINE void turn_back(__m256& a, __m256& b, __m256 cos_a, __m256 sin_a, __m256 cos_b, __m256 sin_b) {
  const __m256 turned = _mm256_fmadd_ps(b, sin_b, _mm256_mul_ps(a, cos_a));
  b = _mm256_fnmadd_ps(a, sin_a, _mm256_mul_ps(b, cos_b));
  a = turned;
}

// row `from` of head_dim values to `to` by `rotate`, half against half.
template <class Rotate>
ISOBATH_INLINE void rotate_row(int64_t d, int64_t t, const float* from, Angles angles, float* to,
                               const Rotate& rotate) {
  const int64_t half = d / 2;
  for (int64_t j = 0; j < half; j += kLanes) {
    __m256 a = load(from + j), b = load(from + half + j);
    if (angles.cos != nullptr) {
      const float *cos = angles.cos + t * d + j, *sin = angles.sin + t * d + j;
      rotate(a, b, load(cos), load(sin), load(cos + half), load(sin + half));
    }
    _mm256_storeu_ps(to + j, a);
    _mm256_storeu_ps(to + half + j, b);
  }
}

// P and dS of one tile of queries against the keys [key, key + kKeyBlock), from scores and dP in their place.
ISOBATH_INLINE void score_gradients(HeadShape shape, const BackwardInputs& inputs, int64_t query, int64_t key,
                                    int64_t n_keys, float* p, float* ds) {
  const __m256 exponent_scale = _mm256_set1_ps(shape.scale * kLog2E), scale = _mm256_set1_ps(shape.scale);
  for (int64_t r = 0; r < kQueryTile; ++r) {
    const int64_t i = query + r;
    const bool exists = i < shape.n_tokens;
    const __m256 log_sum = _mm256_set1_ps(exists ? inputs.log_sums[i] : 0.0F),
                 delta = _mm256_set1_ps(exists ? inputs.deltas[i] : 0.0F);
    for (int64_t k = 0; k < kKeyBlock; k += kLanes) {
      float *p_at = p + r * kKeyBlock + k, *ds_at = ds + r * kKeyBlock + k;
      __m256 probability = _mm256_setzero_ps(), slope = probability;
      if (k < n_keys && exists) {
        const __m256 valid = _mm256_castsi256_ps(first_lanes(i + 1 - key - k));
        const __m256 exponent = _mm256_fmsub_ps(load(p_at), exponent_scale, log_sum);
        // Rounding may leave the exponent just above 0, where it is cut.
        probability = _mm256_and_ps(valid, exp2(_mm256_min_ps(_mm256_setzero_ps(), exponent)));
        slope = _mm256_mul_ps(_mm256_mul_ps(probability, _mm256_sub_ps(load(ds_at), delta)), scale);
      }
      _mm256_storeu_ps(p_at, probability);
      _mm256_storeu_ps(ds_at, slope);
    }
  }
}

// to [kKeyBlock, head_dim] += weightsᵀ rows: weights [kQueryBlock, kKeyBlock], rows [kQueryBlock, head_dim].
ISOBATH_INLINE void add_to_keys(int64_t head_dim, const float* weights, const float* rows, float* to) {
  for (int64_t key = 0; key < kKeyBlock; key += kQueryTile)
    for (int64_t j = 0; j < head_dim; j += kKeyTile) {
      HeadTile tile;
      tile.load(to + key * head_dim + j, head_dim);
      tile.multiply_add(weights + key, 1, kKeyBlock, rows + j, head_dim, kQueryBlock);
      tile.store(to + key * head_dim + j, head_dim);
    }
}

}  // namespace

void gather_rows(HeadShape shape, Rows<const float> from, Angles angles, float* to) {
  const int64_t d = shape.head_dim;
  for (int64_t t = 0; t < shape.n_tokens; ++t)
    rotate_row(d, t, from.data + t * from.stride, angles, to + t * d,
               [](auto&&... values) { turn(values...); });
  for (int64_t i = shape.n_tokens * d; i < padded_length(shape.n_tokens) * d; i += kLanes)
    _mm256_storeu_ps(to + i, _mm256_setzero_ps());
}

void pack_keys(HeadShape shape, const float* rows, float* to) {
  const int64_t d = shape.head_dim;
  for (int64_t t = 0; t < padded_length(shape.n_tokens); t += kLanes)
    for (int64_t j = 0; j < d; j += kLanes) {
      __m256 block[kLanes];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes; ++i) block[i] = load(rows + (t + i) * d + j);
      transpose(block);
      float* target = to + t / kKeyTile * kKeyTile * d + t % kKeyTile;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kLanes; ++i) _mm256_storeu_ps(target + (j + i) * kKeyTile, block[i]);
    }
}

int64_t attention_scratch(HeadShape shape) {
  // Forward: outputs of a block of queries and scores of a tile. Backward: P and dS of a block.
  const int64_t forward = kQueryBlock * shape.head_dim + kQueryTile * kKeyBlock;
  constexpr int64_t kBackward = 2 * kQueryBlock * kKeyBlock;
  return forward > kBackward ? forward : kBackward;
}

void attend_queries(HeadShape shape, const float* queries, const float* keys, const float* values,
                    Rows<float> out, float* log_sums, float* scratch) {
  const int64_t d = shape.head_dim;
  const float scale = shape.scale * kLog2E;
  float *sums = scratch, *weights = scratch + kQueryBlock * d;
  for (int64_t block = 0; block < shape.n_tokens; block += kQueryBlock) {
    const int64_t block_end = block + kQueryBlock < shape.n_tokens ? block + kQueryBlock : shape.n_tokens;
    Running running[kQueryBlock];
    for (int64_t i = 0; i < kQueryBlock * d; i += kLanes) _mm256_storeu_ps(sums + i, _mm256_setzero_ps());
    for (int64_t key = 0; key < block_end; key += kKeyBlock)
      for (int64_t query = block; query < block_end; query += kQueryTile) {
        const int64_t n_keys = visible_keys(query, key);
        if (n_keys == 0) continue;
        scores(d, queries + query * d, keys + key * d, n_keys, weights);
        float shrink[kQueryTile];
        for (int64_t r = 0; r < kQueryTile; ++r)
          shrink[r] = exponentials(weights + r * kKeyBlock, scale, query + r + 1 - key, n_keys,
                                   running[query - block + r]);
        for (int64_t j = 0; j < d; j += kKeyTile) {
          float* to = sums + (query - block) * d + j;
          HeadTile tile;
          tile.load(to, d);
#pragma GCC unroll 6
          for (int r = 0; r < kQueryTile; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kColumnVectors; ++v)
              tile.sum[r][v] = _mm256_mul_ps(tile.sum[r][v], _mm256_set1_ps(shrink[r]));
          tile.multiply_add(weights, kKeyBlock, 1, values + key * d + j, d, n_keys);
          tile.store(to, d);
        }
      }
    for (int64_t query = block; query < block_end; ++query) {
      const Running& of_query = running[query - block];
      log_sums[query] = of_query.largest + std::log2(of_query.sum);
      const __m256 inverse = _mm256_set1_ps(1.0F / of_query.sum);
      for (int64_t j = 0; j < d; j += kLanes)
        _mm256_storeu_ps(out.data + query * out.stride + j,
                         _mm256_mul_ps(load(sums + (query - block) * d + j), inverse));
    }
  }
}

void attend_backward(HeadShape shape, const BackwardInputs& inputs, float* query_gradients,
                     float* key_gradients, float* value_gradients, float* scratch) {
  const int64_t d = shape.head_dim;
  float *p = scratch, *ds = scratch + kQueryBlock * kKeyBlock;
  for (int64_t block = 0; block < shape.n_tokens; block += kQueryBlock) {
    for (int64_t i = block * d; i < (block + kQueryBlock) * d; i += kLanes)
      _mm256_storeu_ps(query_gradients + i, _mm256_setzero_ps());
    for (int64_t key = 0; key < block + kQueryBlock; key += kKeyBlock) {
      for (int64_t sub = 0; sub < kQueryBlock; sub += kQueryTile) {
        const int64_t query = block + sub, n_keys = visible_keys(query, key);
        float *p_tile = p + sub * kKeyBlock, *ds_tile = ds + sub * kKeyBlock;
        scores(d, inputs.queries + query * d, inputs.packed_keys + key * d, n_keys, p_tile);
        // dP = dO Vᵀ
        scores(d, inputs.gradients + query * d, inputs.packed_values + key * d, n_keys, ds_tile);
        score_gradients(shape, inputs, query, key, n_keys, p_tile, ds_tile);
        for (int64_t j = 0; j < d; j += kKeyTile) {  // dQ += dS K
          HeadTile tile;
          tile.load(query_gradients + query * d + j, d);
          tile.multiply_add(ds_tile, kKeyBlock, 1, inputs.keys + key * d + j, d, n_keys);
          tile.store(query_gradients + query * d + j, d);
        }
      }
      add_to_keys(d, p, inputs.gradients + block * d, value_gradients + key * d);  // dV += Pᵀ dO
      add_to_keys(d, ds, inputs.queries + block * d, key_gradients + key * d);     // dK += dSᵀ Q
    }
  }
}

void scatter_rows(HeadShape shape, const float* rows, Angles angles, Rows<float> to) {
  for (int64_t t = 0; t < shape.n_tokens; ++t)
    rotate_row(shape.head_dim, t, rows + t * shape.head_dim, angles, to.data + t * to.stride,
               [](auto&&... values) { turn_back(values...); });
}

void dot_rows(HeadShape shape, Rows<const float> a, Rows<const float> b, float* deltas) {
  for (int64_t t = 0; t < shape.n_tokens; ++t) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t j = 0; j < shape.head_dim; j += kLanes)
      sum = _mm256_fmadd_ps(load(a.data + t * a.stride + j), load(b.data + t * b.stride + j), sum);
    deltas[t] = sum_of(sum);
  }
}

}  // namespace isobath::kernels::avx2
#pragma GCC pop_options
#endif
