#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <vector>

namespace isobath::sensitivity {

/// The output rows of a linear in groups, each with token weights of its own.
struct RowGroups {
  /// [d_out] i64, CPU: the rows, those of a group together; undefined: 0, 1, 2 …
  at::Tensor order;
  std::vector<Range> ranges;  ///< of each group in that order: consecutive, from 0 to d_out, none empty
};

/// Length of a row's profile: a sketch of its squared gradients over all tokens.
inline constexpr int64_t kProfileLength = 64;

/// Sketches of the squared gradients of each output row over the tokens of a microbatch: Σ_i G_ij² r_i, r_i
/// the ±1 signs of token i, keyed by sequence and place in it. Sketches of several microbatches (and label
/// draws, whose signs are the same) add up; their inner products are those of the squared gradients in
/// expectation.
///
/// gradient        [b, T, d_out], any float dtype and device -> [d_out, kProfileLength] f32, CPU
/// first_sequence  global index of row 0. Cost: one f32 product of 64·b·T·d_out multiply-adds.
[[nodiscard]] at::Tensor row_profiles(const at::Tensor& gradient, int64_t first_sequence, uint64_t seed);

/// Groups of rows of like profile, by k-means on profiles scaled to norm 1: what counts is which tokens a
/// row's gradients are large at, not how large they are. Seeds are drawn as k-means++ does, then Lloyd's
/// steps until nothing changes, at most 50; a tie goes to the lower group, and a group that loses its last
/// row takes the one farthest from its centre. A row without gradients is a point in the origin. Groups are
/// numbered by their first rows, and a group's rows ascend.
///
/// profiles  [d_out, n], any float dtype, CPU. n_groups: 1 … d_out. stream: of random numbers, one a linear.
/// Cost      O(rounds · d_out · n_groups · n), f64; the same bits for any number of threads.
/// Throws    NumericError naming the first row whose profile is not finite.
/// Source    Arthur & Vassilvitskii, k-means++ (SODA 2007); Lloyd (1982).
[[nodiscard]] RowGroups cluster_rows(const at::Tensor& profiles, int64_t n_groups, uint64_t seed,
                                     uint64_t stream);

/// Sum over the rows of ‖p − mean of its group‖², p the profiles scaled to norm 1: what cluster_rows lowers.
/// profiles as there; groups: of all rows. Cost: O(d_out · n).
[[nodiscard]] double deviation_within(const at::Tensor& profiles, const RowGroups& groups);

}  // namespace isobath::sensitivity
