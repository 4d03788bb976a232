#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <isobath/core/error.hpp>
#include <isobath/core/partition.hpp>
#include <isobath/kernels/squares.hpp>
#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::sensitivity {
namespace {

// Tokens squared at a time: fixed, so that the products have the same shapes on every rank count.
constexpr int64_t kTileTokens = 128;

// weights [n, groups] of gradient [n, d_out]: gathering the columns of each group takes several times as long
// as this product.
void weigh_scattered(const at::Tensor& gradient, const RowGroups& groups, at::Tensor weights) {
  at::Tensor shares = at::zeros({gradient.size(1), std::ssize(groups.ranges)}, at::kFloat);
  for (int64_t group = 0; group < std::ssize(groups.ranges); ++group) {
    const Range rows = groups.ranges[static_cast<size_t>(group)];
    shares.select(1, group).index_fill_(0, groups.order.slice(0, rows.begin, rows.end),
                                        1.0 / static_cast<double>(rows.size()));
  }
  shares = shares.to(gradient.device());
  for (int64_t begin = 0; begin < gradient.size(0); begin += kTileTokens) {
    const int64_t end = std::min(begin + kTileTokens, gradient.size(0));
    at::Tensor part = weights.slice(0, begin, end);
    at::mm_out(part, gradient.slice(0, begin, end).to(at::kFloat).square(), shares);
  }
}

}  // namespace

at::Tensor mean_over_channels(const at::Tensor& weights, const std::vector<Range>& groups) {
  ISOBATH_CHECK(weights.size(-1) == std::ssize(groups), "weights of {} row groups, not of {}",
                weights.size(-1), groups.size());
  if (groups.size() == 1) return weights.select(-1, 0);
  std::vector<double> shares;
  for (const Range& rows : groups)
    shares.push_back(static_cast<double>(rows.size()) / static_cast<double>(groups.back().end));
  return weights.to(at::kDouble).matmul(at::tensor(shares, at::kDouble)).to(at::kFloat);
}

RowGroups row_ranges(int64_t n_rows, int64_t row_groups, int64_t unit) {
  ISOBATH_CHECK(unit > 0 && n_rows % unit == 0 && 1 <= row_groups && row_groups <= n_rows / unit,
                "{} row groups of {} rows in units of {}", row_groups, n_rows, unit);
  RowGroups groups;
  for (int64_t group = 0; group < row_groups; ++group) {
    const Range units = partition(n_rows / unit, row_groups, group);
    groups.ranges.push_back({units.begin * unit, units.end * unit});
  }
  return groups;
}

at::Tensor token_weights(const at::Tensor& gradient, int64_t row_groups) {
  ISOBATH_CHECK(gradient.dim() == 3, "token_weights expects a gradient [b, T, d_out], found {} dimensions",
                gradient.dim());
  return token_weights(gradient, row_ranges(gradient.size(2), row_groups, 1));
}

at::Tensor token_weights(const at::Tensor& gradient, const RowGroups& row_groups) {
  const std::vector<Range>& ranges = row_groups.ranges;
  ISOBATH_CHECK(gradient.dim() == 3 && !ranges.empty() && ranges.front().begin == 0 &&
                    ranges.back().end == gradient.size(2),
                "token_weights expects a gradient [b, T, d_out] and groups of all its rows");
  const c10::NoGradGuard no_grad;
  at::Tensor weights = at::empty({gradient.size(0), gradient.size(1), std::ssize(ranges)},
                                 gradient.options().dtype(at::kFloat));
  if (row_groups.order.defined()) {
    weigh_scattered(gradient.flatten(0, 1), row_groups, weights.view({-1, std::ssize(ranges)}));
    return weights;
  }
  for (int64_t group = 0; group < std::ssize(ranges); ++group) {
    const Range rows = ranges[static_cast<size_t>(group)];
    weights.select(2, group).copy_(
        kernels::row_squares(gradient.slice(2, rows.begin, rows.end)).div_(static_cast<double>(rows.size())));
  }
  return weights;
}

double clip_threshold(const at::Tensor& d, double quantile) {
  ISOBATH_CHECK(0.0 <= quantile && quantile <= 1.0, "quantile {} outside [0, 1]", quantile);
  const at::Tensor values = d.to(at::kCPU, at::kDouble).reshape({-1});
  at::Tensor positive = values.masked_select(values > 0.0);
  const int64_t n = positive.numel();
  if (n == 0) return 0.0;
  double* const first = positive.data_ptr<double>();
  const double position = quantile * static_cast<double>(n - 1);
  const auto below = static_cast<int64_t>(position);
  std::nth_element(first, first + below, first + n);
  if (below + 1 == n) return first[below];
  const double upper = *std::min_element(first + below + 1, first + n);
  return first[below] + (position - static_cast<double>(below)) * (upper - first[below]);
}

at::Tensor robust(const at::Tensor& d, double threshold, double exponent) {
  ISOBATH_CHECK(threshold >= 0.0, "clip threshold {} is negative", threshold);
  const at::Tensor weights = d.to(at::kDouble).clamp_max(threshold).pow(exponent);
  // D⁰ = 1 must not revive padding, whose weight is zero.
  return weights.masked_fill(d <= 0, 0.0).to(at::kFloat);
}

at::Tensor shrunk(const at::Tensor& d, const at::Tensor& real, double rho, double ratio) {
  ISOBATH_CHECK(0.0 <= rho && rho <= 1.0, "shrinkage {} outside [0, 1]", rho);
  const at::Tensor weights = (d.to(at::kDouble) * (1.0 - rho) + rho * ratio).to(at::kFloat);
  return real.defined() ? weights.masked_fill(real.logical_not(), 0.0) : weights;
}

double automatic_shrinkage(double n_effective, int64_t n_channels) {
  return static_cast<double>(n_channels) / (static_cast<double>(n_channels) + n_effective);
}

double effective_samples(double sum, double sum_of_squares) {
  return sum_of_squares > 0.0 ? sum * sum / sum_of_squares : 0.0;
}

}  // namespace isobath::sensitivity
