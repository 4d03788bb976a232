#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <isobath/core/error.hpp>
#include <isobath/kernels/gram.hpp>
#include <isobath/sensitivity/covariance.hpp>

namespace isobath::sensitivity {
namespace {

// Fixed widths, so that the products have the same shape on every rank count; chosen by measurement
// (bench/covariance_bench.cpp): narrow panels save more of the lower triangle, wide ones run closer to peak.
int64_t panel_width(int64_t n_channels) {
  return n_channels <= 1024 ? 128 : 256;
}

[[noreturn]] void report_non_finite(const at::Tensor& weighted, const at::Tensor& weights) {
  const at::Tensor squares = weighted.square().sum(1);
  const at::Tensor bad = squares.isfinite().logical_not().nonzero();
  // Without a bad row only the sum over all of them overflows: name the largest.
  const int64_t row = bad.size(0) > 0 ? bad[0][0].item<int64_t>() : squares.argmax().item<int64_t>();
  const double weight = weights.defined() ? weights[row].item<double>() : 1.0;
  fail<NumericError>(
      "covariance: expected finite activations and weights >= 0, found non-finite D·x² in row {} "
      "(token weight {}); check the calibration sequence at that row and the weights of the model",
      row, weight);
}

void check_inputs(const at::Tensor& x, const at::Tensor& weights, bool has_channels, int64_t n_channels) {
  ISOBATH_CHECK(x.dim() == 2 && has_channels, "covariance of {} channels given x with {} dimensions, last {}",
                n_channels, x.dim(), x.size(-1));
  ISOBATH_CHECK(!weights.defined() || (weights.dim() == 1 && weights.size(0) == x.size(0)),
                "covariance: one weight per row of x [{}, {}] expected", x.size(0), x.size(1));
}

at::Tensor roots_of(const at::Tensor& weights) {
  return weights.defined() ? weights.to(at::kFloat).sqrt() : weights;
}

// √D·x in f32: on both sides it keeps the product symmetric, and so half of it unnecessary.
at::Tensor weighted_rows(const at::Tensor& x, const at::Tensor& weights) {
  at::Tensor weighted = x.to(at::kFloat).contiguous();
  if (weights.defined()) {
    weighted = weighted * roots_of(weights).unsqueeze(1);
    // 0·inf is NaN: padding may hold anything.
    weighted.masked_fill_((weights == 0).unsqueeze(1), 0.0);
  }
  const at::Tensor flat = weighted.view({-1});
  if (!std::isfinite(at::dot(flat, flat).item<float>())) report_non_finite(weighted, weights);
  return weighted;
}

void add_panel(at::Tensor panel, const at::Tensor& weighted, Range columns) {
  panel.addmm_(weighted.slice(1, 0, columns.end).t(), weighted.slice(1, columns.begin, columns.end));
}

at::Tensor zeros(int64_t n_rows, int64_t n_columns, c10::Device device) {
  return at::zeros({n_rows, n_columns}, at::TensorOptions().dtype(at::kFloat).device(device));
}

}  // namespace

Covariance::Covariance(int64_t n_channels, c10::Device device) : n_channels_(n_channels), device_(device) {}

void Covariance::add(const at::Tensor& x, const at::Tensor& weights) {
  check_inputs(x, weights, x.size(-1) == n_channels_, n_channels_);
  if (x.size(0) == 0) return;
  if (!upper_.defined()) upper_ = zeros(n_channels_, n_channels_, device_);
  const c10::NoGradGuard no_grad;
  if (kernels::has_gram(x) && kernels::add_gram(upper_, x, roots_of(weights))) return;
  const at::Tensor weighted = weighted_rows(x, weights);
  const int64_t panel = panel_width(n_channels_);
  for (int64_t begin = 0; begin < n_channels_; begin += panel) {
    const Range columns{begin, std::min(begin + panel, n_channels_)};
    add_panel(upper_.slice(0, 0, columns.end).slice(1, begin, columns.end), weighted, columns);
  }
}

at::Tensor Covariance::take_upper() {
  return upper_.defined() ? std::move(upper_) : zeros(n_channels_, n_channels_, device_);
}

at::Tensor mirrored(at::Tensor upper) {
  // In squares, so that what is transposed stays in cache.
  constexpr int64_t kSquare = 256;
  const int64_t n_channels = upper.size(0);
  for (int64_t begin = 0; begin < n_channels; begin += kSquare) {
    const int64_t end = std::min(begin + kSquare, n_channels);
    at::Tensor rows = upper.slice(0, begin, end);
    for (int64_t left = 0; left < begin; left += kSquare)
      rows.slice(1, left, left + kSquare)
          .copy_(upper.slice(0, left, left + kSquare).slice(1, begin, end).t());
    at::Tensor square = rows.slice(1, begin, end);
    square.copy_(square.triu() + square.triu(1).t());
  }
  return upper;
}

CovariancePanels::CovariancePanels(std::vector<Range> columns, c10::Device device)
    : columns_(std::move(columns)), device_(device), has_kernel_(true) {
  for (size_t p = 0; p < columns_.size(); ++p) {
    ISOBATH_CHECK(p == 0 || columns_[p].begin == columns_[p - 1].end,
                  "panels that do not stand side by side");
    has_kernel_ &= columns_[p].begin % kernels::kGramAlignment == 0;
  }
}

void CovariancePanels::add(const at::Tensor& x, const at::Tensor& weights) {
  const int64_t end = columns_.back().end;
  check_inputs(x, weights, x.size(-1) >= end, end);
  if (x.size(0) == 0) return;
  begin_sums();
  const c10::NoGradGuard no_grad;
  if (has_kernel_ && kernels::has_gram(x) &&
      kernels::add_gram_panels(panels_, columns_.front().begin, x, roots_of(weights)))
    return;
  const at::Tensor weighted = weighted_rows(x.slice(1, 0, end), weights);
  for (size_t p = 0; p < columns_.size(); ++p) add_panel(panels_[p], weighted, columns_[p]);
}

void CovariancePanels::begin_sums() {
  if (!panels_.empty()) return;
  for (const Range& columns : columns_) panels_.push_back(zeros(columns.end, columns.size(), device_));
}

std::vector<at::Tensor> CovariancePanels::take() {
  begin_sums();
  return std::exchange(panels_, {});
}

at::Tensor covariance_reference(const at::Tensor& x, const at::Tensor& weights) {
  ISOBATH_CHECK(x.dim() == 2 && x.scalar_type() == at::kDouble, "covariance_reference expects x [n, d] f64");
  const int64_t n = x.size(0), n_channels = x.size(1);
  at::Tensor h = at::zeros({n_channels, n_channels}, at::kDouble);
  const at::Tensor d = weights.defined() ? weights.to(at::kDouble).contiguous() : at::ones({n}, at::kDouble);
  const auto x_at = x.accessor<double, 2>();
  const auto d_at = d.accessor<double, 1>();
  auto h_at = h.accessor<double, 2>();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n_channels; ++j)
      for (int64_t k = 0; k < n_channels; ++k) h_at[j][k] += d_at[i] * x_at[i][j] * x_at[i][k];
  return h;
}

}  // namespace isobath::sensitivity
