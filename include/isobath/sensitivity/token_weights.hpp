#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <isobath/sensitivity/row_clusters.hpp>
#include <vector>

namespace isobath::sensitivity {

/// D[i, k] = mean over the output channels j of row group k of G_ij² [AS 6, per row group: GuidedQuant].
/// gradient [b, T, d_out] -> [b, T, row_groups] f32. Row group k is rows partition(d_out, row_groups, k).
[[nodiscard]] at::Tensor token_weights(const at::Tensor& gradient, int64_t row_groups);
/// The same for given row groups. With an order of rows one product of G² with the groups' shares, else no
/// copy of G.
[[nodiscard]] at::Tensor token_weights(const at::Tensor& gradient, const RowGroups& row_groups);

/// D of the whole linear: the mean over all its output channels. weights [.., row_groups] of groups of these
/// rows -> [..], f32.
[[nodiscard]] at::Tensor mean_over_channels(const at::Tensor& weights, const std::vector<Range>& groups);

/// `row_groups` groups of `n_rows` output rows, each of whole `unit`s (rows of a head; 1: rows): as equal as
/// that allows. Precondition: unit divides n_rows, at least one unit a group.
[[nodiscard]] RowGroups row_ranges(int64_t n_rows, int64_t row_groups, int64_t unit);

/// How raw D becomes the weight inside the solver (METHOD §1).
struct RobustSpec {
  /// Values above this quantile of the positive weights are lowered to it; 1: none.
  double clip_quantile = 0.999;
  double exponent = 1.0;  ///< D^γ
};

/// The clip threshold of a module: the `quantile` of its positive D (padding and tokens that predict nothing
/// have none), in f64 with linear interpolation as numpy.quantile; 0 when no D is positive. d: any shape f32.
/// Cost: O(n), one f64 copy.
[[nodiscard]] double clip_threshold(const at::Tensor& d, double quantile);
/// min(D, threshold)^exponent, normalised by nothing; zeros stay zero for every exponent. f32, same shape.
[[nodiscard]] at::Tensor robust(const at::Tensor& d, double threshold, double exponent);

/// D' = (1−ρ)·D + ρ·ratio on `real` tokens (undefined: all are), 0 elsewhere; f32, same shape. With ratio =
/// tr(XᵀDX)/tr(XᵀX), XᵀD'X = (1−ρ)·H_D + ρ·H_1·tr(H_D)/tr(H_1): H shrunk towards that of equal tokens, its
/// trace kept (METHOD §1). d and real of one shape.
[[nodiscard]] at::Tensor shrunk(const at::Tensor& d, const at::Tensor& real, double rho, double ratio);
/// ρ = d/(d + n_eff): half when as many tokens count as there are channels. 1 when none counts.
[[nodiscard]] double automatic_shrinkage(double n_effective, int64_t n_channels);

/// Effective samples (ΣD)²/ΣD² from the two sums; 0 when all weights are zero.
[[nodiscard]] double effective_samples(double sum, double sum_of_squares);

}  // namespace isobath::sensitivity
