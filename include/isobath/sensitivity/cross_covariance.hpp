#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <vector>

namespace isobath::sensitivity {

/// C = Σ_i D_i (x̃_i − x_i) x_iᵀ, accumulated in f32 over the microbatches of one logical shard: how the
/// deviation of a linear's input from that of the original model goes with the input. Below it, where asked
/// for, P = Σ_i D_i (r̃_i − r_i) x_iᵀ: the same of the residual stream that the linear's output is added to.
///
/// Memory   d + d_r f32 a column, and 2 n·d + n·d_r f32 during a call.
///
/// Cost     n·(d + d_r) multiply-adds per column and call.
///
/// Source   METHOD §2; Arai & Ichikawa, QEP (2025); Li et al., GPTAQ (2025), with D = 1.
class CrossCovariance {
 public:
  /// n_residual: d_r; 0: C alone.
  explicit CrossCovariance(int64_t n_channels, c10::Device device = c10::Device(c10::kCPU),
                           int64_t n_residual = 0);
  /// Panels of columns side by side, at least one, for matrices too wide to stand whole anywhere.
  CrossCovariance(int64_t n_channels, std::vector<Range> columns, c10::Device device, int64_t n_residual = 0);

  /// x [n, d] any float dtype, the input behind the quantized prefix; original [n, d], the input of the same
  /// tokens in the original model; residual [n, d_r] f32 r̃ − r, undefined where d_r is 0; weights [n] f32 >=
  /// 0 or undefined (D = 1); rows with weight 0 (padding) contribute nothing, whatever they hold. Local;
  /// synchronises a device once.
  ///
  /// Throws   NumericError naming the first row with a non-finite weighted deviation, before anything is
  ///          added.
  void add(const at::Tensor& x, const at::Tensor& original, const at::Tensor& weights,
           const at::Tensor& residual = {});

  /// Of each range of columns [d + d_r, width] f32; row: channel of the deviation, column: channel of x. All
  /// sums start again from zero.
  [[nodiscard]] std::vector<at::Tensor> take();

 private:
  void begin_sums();

  int64_t n_channels_, n_residual_;
  std::vector<Range> columns_;
  bool has_kernel_ = true;  ///< takes panels of these widths
  c10::Device device_;
  std::vector<at::Tensor> sums_;
};

/// Literal reference by plain loops over [n, d] f64 inputs.
[[nodiscard]] at::Tensor cross_covariance_reference(const at::Tensor& x, const at::Tensor& original,
                                                    const at::Tensor& weights);

}  // namespace isobath::sensitivity
