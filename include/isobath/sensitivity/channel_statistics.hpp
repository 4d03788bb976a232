#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace isobath::sensitivity {

/// How the per-sequence estimator α⁽⁵⁾ is had: not at all, from ±1 probes (unbiased), or from the full GᵀX of
/// each sequence (costs as much as a weight gradient).
enum class PerSequence { off, probes, exact };

/// Per-input-channel statistics of one linear over tokens, streamed [AS 5, 6]. All sums over tokens or
/// sequences, not means. Within a sequence sums run in f32, over sequences in f64 in the order observed.
///
/// A monoid: adding `sums` and taking the larger `maxima` gives what one object that saw everything gives, up
/// to the order of f64 sums, which TreeSum fixes. α weighs a token by ‖G_i‖², the *sum* over all output
/// channels, as [AS 6] does; token_weights is the mean: with one row group α⁽⁶⁾ = d_out · Σ_i D_i x_ij².
class ChannelStatistics {
 public:
  ChannelStatistics(int64_t n_channels, PerSequence per_sequence, int64_t n_probes, uint64_t seed);

  /// Adds a microbatch. x [b, T, d_in], gradient [b, T, d_out] (any float dtype), mask [b, T] bool or
  /// undefined (true: a real token; what padding holds is not looked at), first_sequence: global index of row
  /// 0, key of the probe signs. sample: index of the label draw; what depends on x alone is counted at sample
  /// 0 only, α is summed over the samples.
  ///
  /// Cost     a few passes over x and gradient; exact: T·d_in·d_out f32 multiply-adds more per sequence.
  ///
  /// Throws   NumericError when an activation or a gradient is not finite (channel, sequence, token).
  void observe(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask,
               int64_t first_sequence, int64_t sample);

  /// State as one f64 tensor for summation over shards (TreeSum), and its inverse. max|x| is separate because
  /// it combines by max. Rows: Σx² · α⁽⁶⁾ · α⁽⁵⁾ · n_tokens · n_sequences (counts in column 0).
  [[nodiscard]] at::Tensor sums() const;    ///< [5, d] f64, CPU
  [[nodiscard]] at::Tensor maxima() const;  ///< [d] f32 max|x|, CPU
  static ChannelStatistics from(const at::Tensor& sums, const at::Tensor& maxima);

  [[nodiscard]] at::Tensor sum_squares() const;         ///< [d] f64  Σ_i x_ij²
  [[nodiscard]] at::Tensor alpha_per_token() const;     ///< [d] f64  Σ_i ‖G_i‖² x_ij²  [AS 6]
  [[nodiscard]] at::Tensor alpha_per_sequence() const;  ///< [d] f64  Σ_s ‖G_sᵀ X_s,:j‖² [AS 5]
  [[nodiscard]] int64_t n_tokens() const;
  [[nodiscard]] int64_t n_sequences() const;

 private:
  at::Tensor sums_, maxima_;
  PerSequence per_sequence_;
  int64_t n_probes_;
  uint64_t seed_;
};

}  // namespace isobath::sensitivity
