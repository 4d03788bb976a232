#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <vector>

namespace isobath::sensitivity {

/// C = Σ_i D_i (x̃_i − x_i) x_iᵀ, accumulated in f32 over the microbatches of one logical shard: how the
/// deviation of a linear's input from that of the original model goes with the input.
///
/// Memory   d f32 a column, and 2 n·d f32 during a call.
///
/// Cost     n·d multiply-adds per column and call.
///
/// Source   METHOD §2; Arai & Ichikawa, QEP (2025); Li et al., GPTAQ (2025), with D = 1.
class CrossCovariance {
 public:
  explicit CrossCovariance(int64_t n_channels, c10::Device device = c10::Device(c10::kCPU));
  /// Panels of columns side by side, at least one, for matrices too wide to stand whole anywhere.
  CrossCovariance(int64_t n_channels, std::vector<Range> columns, c10::Device device);

  /// x [n, d] any float dtype, the input behind the quantized prefix; original [n, d], the input of the same
  /// tokens in the original model; weights [n] f32 >= 0 or undefined (D = 1); rows with weight 0 (padding)
  /// contribute nothing, whatever they hold. Local; synchronises a device once.
  ///
  /// Throws   NumericError naming the first row with a non-finite weighted deviation, before anything is
  ///          added.
  void add(const at::Tensor& x, const at::Tensor& original, const at::Tensor& weights);

  /// Of each range of columns [d, width] f32; row: channel of the deviation, column: channel of x. All sums
  /// start again from zero.
  [[nodiscard]] std::vector<at::Tensor> take();

 private:
  void begin_sums();

  int64_t n_channels_;
  std::vector<Range> columns_;
  bool has_kernel_ = true;  ///< takes panels of these widths
  c10::Device device_;
  std::vector<at::Tensor> sums_;
};

/// Literal reference by plain loops over [n, d] f64 inputs.
[[nodiscard]] at::Tensor cross_covariance_reference(const at::Tensor& x, const at::Tensor& original,
                                                    const at::Tensor& weights);

}  // namespace isobath::sensitivity
