#include <ATen/ATen.h>
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

}  // namespace

Covariance::Covariance(int64_t n_channels, c10::Device device)
    : upper_(at::zeros({n_channels, n_channels}, at::TensorOptions().dtype(at::kFloat).device(device))) {}

void Covariance::add(const at::Tensor& x, const at::Tensor& weights) {
  const int64_t n_channels = upper_.size(0);
  ISOBATH_CHECK(x.dim() == 2 && x.size(1) == n_channels,
                "covariance of {} channels given x with {} dimensions, last {}", n_channels, x.dim(),
                x.size(-1));
  ISOBATH_CHECK(!weights.defined() || (weights.dim() == 1 && weights.size(0) == x.size(0)),
                "covariance: one weight per row of x [{}, {}] expected", x.size(0), x.size(1));
  if (x.size(0) == 0) return;
  const c10::NoGradGuard no_grad;
  const at::Tensor roots = weights.defined() ? weights.to(at::kFloat).sqrt() : weights;
  if (kernels::has_gram(x) && kernels::add_gram(upper_, x, roots)) return;
  at::Tensor weighted = x.to(at::kFloat).contiguous();
  if (weights.defined()) {
    // √D on both sides keeps the product symmetric, and so half of it unnecessary.
    weighted = weighted * roots.unsqueeze(1);
    // 0·inf is NaN: padding may hold anything.
    weighted.masked_fill_((weights == 0).unsqueeze(1), 0.0);
  }
  const at::Tensor flat = weighted.view({-1});
  if (!std::isfinite(at::dot(flat, flat).item<float>())) report_non_finite(weighted, weights);
  const int64_t panel = panel_width(n_channels);
  for (int64_t begin = 0; begin < n_channels; begin += panel) {
    const int64_t end = std::min(begin + panel, n_channels);
    at::Tensor target = upper_.slice(0, 0, end).slice(1, begin, end);
    target.addmm_(weighted.slice(1, 0, end).t(), weighted.slice(1, begin, end));
  }
}

at::Tensor Covariance::value() const {
  // The panels also hold what stands below the diagonal inside them.
  return at::triu(upper_) + at::triu(upper_, 1).t();
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
