#include <isobath/quant/scale_tuner.hpp>

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <isobath/core/error.hpp>

namespace isobath::quant {
namespace {

constexpr double kDecayOfMean = 0.9, kDecayOfSquare = 0.95, kEpsilon = 1e-8;

}  // namespace

at::Tensor scale_gradient(const at::Tensor& weight_gradient, const QuantizedMatrix& matrix) {
  const int64_t n_rows = matrix.codes.size(0), n_groups = matrix.scale.size(1);
  ISOBATH_CHECK(weight_gradient.sizes() == matrix.codes.sizes(),
                "a gradient of [{}, {}] for codes of [{}, {}]", weight_gradient.size(0),
                weight_gradient.size(1), n_rows, matrix.codes.size(1));
  at::Tensor sums = at::empty({n_rows, n_groups}, weight_gradient.options());
  // Some rows at a time: levels and products stay small, whatever the matrix.
  constexpr int64_t kRows = 1024;
  for (int64_t begin = 0; begin < n_rows; begin += kRows) {
    const auto rows = [&](const at::Tensor& whole) {
      return whole.slice(0, begin, std::min(begin + kRows, n_rows));
    };
    const auto by_group = [&](const at::Tensor& whole) { return rows(whole).unflatten(1, {n_groups, -1}); };
    const at::Tensor levels =
        by_group(matrix.codes).to(at::kFloat) - rows(matrix.zero).to(at::kFloat).unsqueeze(2);
    rows(sums).copy_((by_group(weight_gradient) * levels).sum(2));
  }
  return sums;
}

double share_of_rate(const GridSpec& grid) {
  constexpr int kWidestInFull = 3;
  return std::exp2(std::min(0, kWidestInFull - grid.bits));
}

ScaleTuner::ScaleTuner(const QuantizedMatrix& matrix)
    : matrix_{matrix.spec, matrix.codes, matrix.scale.clone(), matrix.zero},
      first_scale_(matrix_.scale.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true)),
      logarithm_(at::zeros_like(first_scale_)),
      mean_(at::zeros_like(first_scale_)),
      mean_square_(at::zeros_like(first_scale_)) {}

void ScaleTuner::step(const at::Tensor& gradient, double rate) {
  ISOBATH_CHECK(gradient.sizes() == first_scale_.sizes(), "a gradient of {} scales for {}", gradient.numel(),
                first_scale_.numel());
  if (!std::isfinite(gradient.abs().sum(at::kDouble).item<double>()))
    fail<NumericError>("the gradient of the scales is not finite");
  // ∂L/∂t = s ∂L/∂s.
  const at::Tensor of_logarithm = gradient * first_scale_ * logarithm_.exp();
  mean_.mul_(kDecayOfMean).add_(of_logarithm, 1 - kDecayOfMean);
  mean_square_.mul_(kDecayOfSquare).addcmul_(of_logarithm, of_logarithm, 1 - kDecayOfSquare);
  ++n_steps_;
  const auto n = static_cast<double>(n_steps_);
  const at::Tensor direction = (mean_ / (1 - std::pow(kDecayOfMean, n))) /
                               ((mean_square_ / (1 - std::pow(kDecayOfSquare, n))).sqrt_().add_(kEpsilon));
  logarithm_.sub_(direction, rate);
  set_scales();
}

void ScaleTuner::set_scales() {
  matrix_.scale.copy_(first_scale_ * logarithm_.exp());
}

at::Tensor ScaleTuner::state() const {
  return at::stack({logarithm_, mean_, mean_square_}).to(at::kCPU);
}

void ScaleTuner::restore(const at::Tensor& state, int64_t n_steps) {
  const std::array<int64_t, 3> shape{3, first_scale_.size(0), first_scale_.size(1)};
  if (state.sizes() != at::IntArrayRef(shape) || state.scalar_type() != at::kFloat)
    fail<CheckpointError>("a saved state of tuned scales is [{}] {}, expected [{}] float",
                          fmt::join(state.sizes(), ", "), c10::toString(state.scalar_type()),
                          fmt::join(shape, ", "));
  logarithm_.copy_(state[0]);
  mean_.copy_(state[1]);
  mean_square_.copy_(state[2]);
  n_steps_ = n_steps;
  set_scales();
}

}  // namespace isobath::quant
