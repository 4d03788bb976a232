#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <vector>

namespace isobath::sensitivity {

/// H = Σ_i D_i x_i x_iᵀ, accumulated in f32 over the microbatches of one logical shard.
///
/// Memory   d² f32, and n·d f32 during a call.
///
/// Cost     n·d²/2 multiply-adds per call: a symmetric rank-k update in column panels of fixed width.
///
/// Source   METHOD §1; D = 1 gives GPTQ's XᵀX.
class Covariance {
 public:
  explicit Covariance(int64_t n_channels, c10::Device device = c10::Device(c10::kCPU));

  /// x [n, d] any float dtype; weights [n] f32 >= 0 or undefined (D = 1); rows with weight 0 (padding)
  /// contribute nothing, whatever they hold. Local; synchronises a device once.
  ///
  /// Throws   NumericError naming the first row with non-finite D·x² (a negative weight counts as one),
  /// before
  ///          anything is added. Where `kernels::add_gram` works, √D·x is what must be finite: squares that
  ///          overflow f32 (|x| > 1e19) end in a non-finite H, which the factorization refuses.
  void add(const at::Tensor& x, const at::Tensor& weights);

  /// [d, d] f32, of which the upper triangle counts; the sum starts again from zero.
  [[nodiscard]] at::Tensor take_upper();

 private:
  int64_t n_channels_;
  c10::Device device_;
  at::Tensor upper_;  ///< from the first row on
};

/// The symmetric matrix of such a triangle, in place.
[[nodiscard]] at::Tensor mirrored(at::Tensor upper);

/// Panels of the upper triangle of such an H, for matrices too wide to stand whole anywhere: columns
/// [begin, end) and their rows [0, end).
///
/// Memory   the panels, f32, and n·end f32 during a call.
///
/// Cost     n·end·width multiply-adds per panel and call; x is packed once for all of them.
class CovariancePanels {
 public:
  /// columns: of each panel of one H, side by side, at least one.
  explicit CovariancePanels(std::vector<Range> columns, c10::Device device = c10::Device(c10::kCPU));

  /// As Covariance::add; x may be wider than the last panel's end.
  void add(const at::Tensor& x, const at::Tensor& weights);

  /// The panels [end, width] f32, of which the upper triangle counts; all sums start again from zero.
  [[nodiscard]] std::vector<at::Tensor> take();

 private:
  void begin_sums();

  std::vector<Range> columns_;
  c10::Device device_;
  bool has_kernel_;                 ///< takes panels that start here
  std::vector<at::Tensor> panels_;  ///< from the first row on
};

/// Literal reference: f64 Xᵀ diag(D) X by plain loops over [n, d] f64 input.
[[nodiscard]] at::Tensor covariance_reference(const at::Tensor& x, const at::Tensor& weights);

}  // namespace isobath::sensitivity
