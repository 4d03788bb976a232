#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/quant/grid.hpp>

/// Tuning of scales by the gradient of a loss, codes and zeros as they are: w = (code − zero)·s, so
/// ∂L/∂s of a group is Σ_j ∂L/∂w_j (code_j − zero).
namespace isobath::quant {

/// ∂L/∂s [R, G] f32 from ∂L/∂W [R, C] f32, on the device of both; the rounding of scales to storage
/// counts as the identity. Cost: one pass over the gradient.
[[nodiscard]] at::Tensor scale_gradient(const at::Tensor& weight_gradient, const QuantizedMatrix& matrix);

/// Share of a rate that scales of such a grid are tuned with: 1 up to 3 bits, halved for each bit more. What
/// a wide grid leaves to gain is a fraction of its step, and a scale that moves by more fits the calibration
/// tokens alone. Source: measured (docs/results.md, Tuning of scales).
[[nodiscard]] double share_of_rate(const GridSpec& grid);

/// Scales of one matrix under Adam, as s₀·eᵗ with t starting at 0: a step of some size means the same
/// relative change for every scale, and none changes sign. Deterministic, local, on the matrix's device.
///
/// Memory   12 bytes a scale beside the matrix.
/// Source   Kingma & Ba, Adam (2015), with β₁ = 0.9, β₂ = 0.95, ε = 10⁻⁸; scales tuned by the loss of the
///          whole model: Chen et al., EfficientQAT (2024), second phase.
class ScaleTuner {
 public:
  /// Keeps the codes and zeros, and a copy of the scales.
  explicit ScaleTuner(const QuantizedMatrix& matrix);

  /// One step of `rate` against ∂L/∂s [R, G] f32, on the same device. Throws NumericError when it is not
  /// finite.
  void step(const at::Tensor& gradient, double rate);
  /// What the steps so far have made: log(s / s₀), and the means of gradients and of their squares,
  /// [3, R, G] f32 on the host.
  [[nodiscard]] at::Tensor state() const;
  /// Of a tuner of the same matrix after `n_steps` steps: goes on as that one would, bit by bit. Throws
  /// CheckpointError for a state of another shape.
  void restore(const at::Tensor& state, int64_t n_steps);
  /// With the scales as they are now, rounded to storage.
  [[nodiscard]] const QuantizedMatrix& matrix() const { return matrix_; }

 private:
  void set_scales();

  QuantizedMatrix matrix_;
  at::Tensor first_scale_, logarithm_, mean_, mean_square_;  ///< [R, G] f32
  int64_t n_steps_ = 0;
};

}  // namespace isobath::quant
