#include <isobath/sensitivity/cross_covariance.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/gram.hpp>

namespace isobath::sensitivity {

CrossCovariance::CrossCovariance(int64_t n_channels, c10::Device device, int64_t n_residual)
    : CrossCovariance(n_channels, {{0, n_channels}}, device, n_residual) {}

CrossCovariance::CrossCovariance(int64_t n_channels, std::vector<Range> columns, c10::Device device,
                                 int64_t n_residual)
    : n_channels_(n_channels), n_residual_(n_residual), columns_(std::move(columns)), device_(device) {
  for (size_t p = 1; p < columns_.size(); ++p) {
    ISOBATH_CHECK(columns_[p].begin == columns_[p - 1].end, "panels that do not stand side by side");
    has_kernel_ &= columns_[p - 1].size() % kernels::kGramAlignment == 0;
  }
}

void CrossCovariance::begin_sums() {
  if (!sums_.empty()) return;
  for (const Range& columns : columns_)
    sums_.push_back(at::zeros({n_channels_ + n_residual_, columns.size()},
                              at::TensorOptions(at::kFloat).device(device_)));
}

std::vector<at::Tensor> CrossCovariance::take() {
  begin_sums();
  return std::exchange(sums_, {});
}

void CrossCovariance::add(const at::Tensor& x, const at::Tensor& original, const at::Tensor& weights,
                          const at::Tensor& residual) {
  ISOBATH_CHECK(x.dim() == 2 && x.size(1) == n_channels_ && original.sizes() == x.sizes(),
                "cross-covariance of {} channels given x with {} dimensions, last {}", n_channels_, x.dim(),
                x.size(-1));
  ISOBATH_CHECK(!weights.defined() || (weights.dim() == 1 && weights.size(0) == x.size(0)),
                "cross-covariance: one weight per row of x [{}, {}] expected", x.size(0), x.size(1));
  ISOBATH_CHECK(n_residual_ == 0 ||
                    (residual.dim() == 2 && residual.size(0) == x.size(0) && residual.size(1) == n_residual_),
                "cross-covariance: a residual [{}, {}] expected", x.size(0), n_residual_);
  if (x.size(0) == 0) return;
  const c10::NoGradGuard no_grad;
  at::Tensor input = x.to(at::kFloat), deviation = original.to(at::kFloat) - input;
  if (n_residual_ > 0) deviation = at::cat({deviation, residual}, 1);
  if (weights.defined()) {
    deviation *= weights.to(at::kFloat).unsqueeze(1);
    // 0·inf is NaN: padding may hold anything.
    const at::Tensor is_nothing = (weights == 0).unsqueeze(1);
    deviation.masked_fill_(is_nothing, 0.0);
    input = input.masked_fill(is_nothing, 0.0);
  }
  const at::Tensor flat = deviation.view({-1});
  if (!std::isfinite(at::dot(flat, flat).item<float>())) {
    const at::Tensor squares = deviation.square().sum(1);
    const at::Tensor bad = squares.isfinite().logical_not().nonzero();
    const int64_t row = bad.size(0) > 0 ? bad[0][0].item<int64_t>() : squares.argmax().item<int64_t>();
    fail<NumericError>(
        "cross-covariance: expected finite activations in the original and the quantized model, found a "
        "non-finite weighted deviation in row {}; check the calibration sequence at that row",
        row);
  }
  begin_sums();
  const bool has_kernel = has_kernel_ && kernels::has_gram(x);
  const at::Tensor rounded_deviation = has_kernel ? deviation.to(x.scalar_type()) : deviation,
                   rounded = has_kernel ? input.to(x.scalar_type()) : input;
  if (has_kernel && kernels::add_product(sums_, rounded_deviation,
                                         rounded.slice(1, columns_.front().begin, columns_.back().end)))
    return;
  for (size_t p = 0; p < columns_.size(); ++p)
    sums_[p].addmm_(deviation.t(), input.slice(1, columns_[p].begin, columns_[p].end));
}

at::Tensor cross_covariance_reference(const at::Tensor& x, const at::Tensor& original,
                                      const at::Tensor& weights) {
  ISOBATH_CHECK(x.dim() == 2 && x.scalar_type() == at::kDouble && original.scalar_type() == at::kDouble,
                "cross_covariance_reference expects inputs [n, d] f64");
  const int64_t n = x.size(0), n_channels = x.size(1);
  at::Tensor c = at::zeros({n_channels, n_channels}, at::kDouble);
  const at::Tensor d = weights.defined() ? weights.to(at::kDouble).contiguous() : at::ones({n}, at::kDouble);
  const auto x_at = x.accessor<double, 2>(), original_at = original.accessor<double, 2>();
  const auto d_at = d.accessor<double, 1>();
  auto c_at = c.accessor<double, 2>();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n_channels; ++j)
      for (int64_t k = 0; k < n_channels; ++k)
        c_at[j][k] += d_at[i] * (original_at[i][j] - x_at[i][j]) * x_at[i][k];
  return c;
}

}  // namespace isobath::sensitivity
