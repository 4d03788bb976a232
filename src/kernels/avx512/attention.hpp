#pragma once
#include <cstdint>

#include "../attention_types.hpp"

/// AVX-512 BF16 parts of `kernels::attention_*`: one head of one sequence at a time. head_dim is a multiple
/// of 32.
namespace isobath::kernels::avx512 {

inline constexpr int64_t kKeyTile = 48;     ///< keys of a register tile of scores
inline constexpr int64_t kQueryTile = 8;    ///< queries of a register tile
inline constexpr int64_t kQueryBlock = 32;  ///< queries whose scores a backward step holds

[[nodiscard]] constexpr int64_t padded_length(int64_t n_tokens) {
  constexpr int64_t kBoth = 96;  // a multiple of every tile above
  static_assert(kBoth % kKeyTile == 0 && kBoth % kQueryBlock == 0);
  return (n_tokens + kBoth - 1) / kBoth * kBoth;
}

/// to [padded, head_dim] := rotated rows (plain copy when angles.cos is null), zero beyond n_tokens.
void gather_rows(HeadShape shape, Rows<const uint16_t> from, Angles angles, uint16_t* to);
/// to [head_dim / 2, padded] u32: pairs along the head dimension of gathered rows [padded, head_dim].
void pair_channels(HeadShape shape, const uint16_t* rows, uint32_t* to);
/// to [padded / 2, head_dim] u32: pairs of tokens of gathered rows [padded, head_dim].
void pair_tokens(HeadShape shape, const uint16_t* rows, uint32_t* to);

/// Causal attention of one head. queries [padded,
/// head_dim] gathered and rotated, keys as `pair_channels`, values as `pair_tokens`. log_sums [n_tokens]:
/// log₂ Σ exp₂ of the scaled scores. scratch: kQueryTile · padded f32 and as many bf16.
void attend_queries(HeadShape shape, const uint16_t* queries, const uint32_t* keys, const uint32_t* values,
                    Rows<uint16_t> out, float* log_sums, float* scratch, uint16_t* scratch_bf16);

/// What the backward pass of one query head reads, all gathered ([padded, head_dim]) and paired as named.
struct BackwardInputs {
  const uint16_t* queries;          ///< rotated
  const uint32_t* query_tokens;     ///< the same, pairs of tokens
  const uint32_t* key_channels;     ///< rotated keys, pairs of channels
  const uint32_t* key_tokens;       ///< rotated keys, pairs of tokens
  const uint32_t* value_channels;   ///< values, pairs of channels
  const uint16_t* gradients;        ///< of the output
  const uint32_t* gradient_tokens;  ///< the same, pairs of tokens
  const float* log_sums;            ///< of the forward pass
  const float* deltas;              ///< [padded] Σ_j out_ij · gradient_ij
};

/// Floats of scratch that `attend_backward` needs.
[[nodiscard]] int64_t backward_scratch(HeadShape shape);

/// query_gradients: f32 [padded, head_dim], written, still rotated; key_gradients, value_gradients: f32
/// [padded, head_dim], added to, keys still rotated.
void attend_backward(HeadShape shape, const BackwardInputs& inputs, float* query_gradients,
                     float* key_gradients, float* value_gradients, float* scratch);

/// to row t := bf16 of rows [padded, head_dim] f32 rotated back by the angles (copied when angles.cos is
/// null).
void scatter_rows(HeadShape shape, const float* rows, Angles angles, Rows<uint16_t> to);

/// deltas [padded] := Σ_j a_tj · b_tj over rows of one head, zero beyond n_tokens.
void dot_rows(HeadShape shape, Rows<const uint16_t> a, Rows<const uint16_t> b, float* deltas);

}  // namespace isobath::kernels::avx512
