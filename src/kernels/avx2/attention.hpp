#pragma once
#include <cstdint>

#include "../attention_types.hpp"

/// AVX2 parts of `kernels::attention`, f32: one head of one sequence at a time. head_dim is a multiple of 16.
namespace isobath::kernels::avx2 {

inline constexpr int64_t kQueryTile = 6;    ///< rows of a register tile
inline constexpr int64_t kKeyTile = 16;     ///< columns of a register tile
inline constexpr int64_t kQueryBlock = 48;  ///< queries that pass one block of keys together
inline constexpr int64_t kKeyBlock = 96;    ///< keys and values that stay in the second-level cache

[[nodiscard]] constexpr int64_t padded_length(int64_t n_tokens) {
  static_assert(kKeyBlock % kQueryBlock == 0 && kQueryBlock % kQueryTile == 0 &&
                kKeyBlock % kQueryTile == 0 && kKeyBlock % kKeyTile == 0);
  return (n_tokens + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
}

/// to [padded, head_dim] := rotated rows (plain copy when angles.cos is null), zero beyond n_tokens.
void gather_rows(HeadShape shape, Rows<const float> from, Angles angles, float* to);
/// to [padded / kKeyTile, head_dim, kKeyTile]: gathered rows [padded, head_dim] as columns of register tiles.
void pack_keys(HeadShape shape, const float* rows, float* to);

/// Floats of scratch that `attend_queries` and `attend_backward` need.
[[nodiscard]] int64_t attention_scratch(HeadShape shape);

/// Causal attention of one head (Dao et al. 2022, algorithm 1). queries [padded, head_dim] gathered and
/// rotated, keys as `pack_keys`, values [padded, head_dim]. log_sums [n_tokens]: log₂ Σ exp₂ of the scaled
/// scores.
void attend_queries(HeadShape shape, const float* queries, const float* keys, const float* values,
                    Rows<float> out, float* log_sums, float* scratch);

/// What the backward pass of one query head reads; [padded, head_dim] where nothing else is said.
struct BackwardInputs {
  const float* queries;        ///< rotated
  const float* gradients;      ///< of the output
  const float* keys;           ///< rotated
  const float* packed_keys;    ///< the same as `pack_keys`
  const float* packed_values;  ///< as `pack_keys`
  const float* log_sums;       ///< [n_tokens] of the forward pass
  const float* deltas;         ///< [n_tokens] Σ_j out_ij · gradient_ij
};

/// query_gradients: [padded, head_dim], written, still rotated; key_gradients, value_gradients: [padded,
/// head_dim], added to, keys still rotated (Dao et al. 2022, algorithm 4).
void attend_backward(HeadShape shape, const BackwardInputs& inputs, float* query_gradients,
                     float* key_gradients, float* value_gradients, float* scratch);

/// to row t := row t of rows [padded, head_dim] rotated back by the angles (copied when angles.cos is null).
void scatter_rows(HeadShape shape, const float* rows, Angles angles, Rows<float> to);

/// deltas [n_tokens] := Σ_j a_tj · b_tj over rows of one head.
void dot_rows(HeadShape shape, Rows<const float> a, Rows<const float> b, float* deltas);

}  // namespace isobath::kernels::avx2
