#include <ATen/ATen.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/quant/factor.hpp>

namespace isobath::quant {

/// Columns that LAPACK and BLAS-3 triangular solves, which run at half the rate of products, see at once.
static constexpr int64_t kStep = 128;

void check_finite(const at::Tensor& columns, int64_t first_column) {
  // One bad entry makes the sum non-finite; the search for it is paid only then.
  if (std::isfinite(columns.sum(at::kDouble).item<double>())) return;
  const at::Tensor bad = at::isfinite(columns).logical_not().nonzero();
  if (bad.size(0) == 0) return;
  const auto row = bad[0][0].item<int64_t>(), column = bad[0][1].item<int64_t>();
  fail<NumericError>(
      "the Hessian of the module is not finite: first at row {}, column {} ({}), {} of {} entries; its "
      "calibration activations or gradients overflowed, use a wider dtype or look for a corrupt sequence",
      row, first_column + column, columns[row][column].item<double>(), bad.size(0), columns.numel());
}

std::vector<Range> column_panels(int64_t n_columns, int64_t width) {
  ISOBATH_CHECK(width > 0, "panels of {} columns", width);
  std::vector<Range> panels;
  for (int64_t begin = 0; begin < n_columns; begin += width)
    panels.push_back({begin, std::min(begin + width, n_columns)});
  return panels;
}

Factor factor_of_diagonal(const at::Tensor& diagonal, const FactorSpec& spec) {
  ISOBATH_CHECK(spec.damping >= 0 && spec.max_damping >= spec.damping, "damping {} … {}", spec.damping,
                spec.max_damping);
  const int64_t n_columns = diagonal.size(0);
  Factor factor;
  factor.damping = spec.damping;
  factor.dead = diagonal == 0;
  factor.importance = at::where(factor.dead, at::ones({}, at::kDouble), diagonal).to(at::kFloat).contiguous();
  factor.order = spec.act_order == ActOrder::static_groups
                     ? std::get<1>(at::sort(diagonal, /*stable=*/true, /*dim=*/0, /*descending=*/true))
                     : at::arange(n_columns, at::kLong);
  const auto n_live = n_columns - factor.dead.sum().item<int64_t>();
  if (n_live > 0) factor.mean = diagonal.sum().item<double>() / static_cast<double>(n_live);
  factor.curvature = at::zeros({n_columns}, at::kDouble);
  factor.panels.resize(column_panels(n_columns, spec.panel_width).size());
  return factor;
}

at::Tensor damped_panel(const at::Tensor& columns, const Factor& factor) {
  const int64_t end = columns.size(0), width = columns.size(1), begin = end - width;
  const at::Tensor dead = factor.dead.index_select(0, factor.order.slice(0, 0, end)).to(columns.device());
  const at::Tensor own_dead = dead.slice(0, begin);
  at::Tensor panel = columns.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  panel.masked_fill_(dead.unsqueeze(1), 0).masked_fill_(own_dead.unsqueeze(0), 0);
  at::Tensor diagonal = panel.slice(0, begin).diagonal();
  // Any positive diagonal does for a dead column; the mean keeps the matrix well scaled.
  diagonal.masked_fill_(own_dead, factor.mean).add_(factor.damping * factor.mean);
  return panel;
}

/// R of a square A = R Rᵀ of which the upper triangle counts; undefined when A is not positive definite.
static at::Tensor small_root(const at::Tensor& a) {
  const auto [lower, info] = at::linalg_cholesky_ex(a.flip({0, 1}));
  return info.item<int>() == 0 ? lower.flip({0, 1}) : at::Tensor();
}

bool factorize_panel(at::Tensor& panel) {
  const int64_t width = panel.size(1), begin = panel.size(0) - width;
  for (int64_t end = width; end > 0;) {
    const int64_t first = std::max<int64_t>(0, end - kStep), row = begin + first;
    at::Tensor columns = panel.slice(1, first, end);
    at::Tensor square = columns.slice(0, row, begin + end), above = columns.slice(0, 0, row);
    const at::Tensor root = small_root(square);
    if (!root.defined()) return false;
    square.copy_(root);
    columns.slice(0, begin + end).zero_();
    if (row > 0) above.copy_(at::linalg_solve_triangular(root.t(), above, /*upper=*/false, /*left=*/false));
    if (first > 0) panel.slice(0, 0, row).slice(1, 0, first).addmm_(above, above.slice(0, begin).t(), 1, -1);
    end = first;
  }
  return true;
}

void subtract_panel(at::Tensor& panel, const at::Tensor& later) {
  const int64_t end = panel.size(0), begin = end - panel.size(1);
  panel.addmm_(later.slice(0, 0, end), later.slice(0, begin, end).t(), 1, -1);
}

std::optional<FeedbackPanel> feedback_panel(const at::Tensor& panel) {
  const at::Tensor diagonal = panel.slice(0, panel.size(0) - panel.size(1)).diagonal();
  FeedbackPanel feedback{(panel / diagonal).to(at::kFloat), diagonal.square()};
  const bool usable = std::isfinite(feedback.panel.sum(at::kDouble).item<double>()) &&
                      (feedback.curvature > 0).all().item<bool>() &&
                      std::isfinite(feedback.curvature.sum().item<double>());
  return usable ? std::optional(std::move(feedback)) : std::nullopt;
}

bool raise_damping(Factor& factor, const FactorSpec& spec) {
  constexpr double kFirstStep = 0.01, kGrowth = 10, kSlack = 1 + 1e-9;
  const double next = factor.damping > 0 ? factor.damping * kGrowth : kFirstStep;
  if (next > spec.max_damping * kSlack) {
    factor.failed = true;
    return false;
  }
  factor.damping = next;
  ++factor.n_fallbacks;
  return true;
}

/// All panels of R diag(R)⁻¹ for the factor's λ; false when H + λI is not positive definite.
static bool fill(Factor& factor, const at::Tensor& h, const std::vector<Range>& ranges, bool is_permuted) {
  std::vector<at::Tensor> panels;
  for (const Range& range : ranges) {
    const at::Tensor columns = is_permuted ? h.index_select(1, factor.order.slice(0, range.begin, range.end))
                                                 .index_select(0, factor.order.slice(0, 0, range.end))
                                           : h.slice(0, 0, range.end).slice(1, range.begin, range.end);
    panels.push_back(damped_panel(columns, factor));
  }
  for (size_t p = ranges.size(); p-- > 0;) {
    if (!factorize_panel(panels[p])) return false;
    for (size_t earlier = 0; earlier < p; ++earlier) subtract_panel(panels[earlier], panels[p]);
    auto feedback = feedback_panel(panels[p]);
    panels[p].reset();
    if (!feedback) return false;
    factor.panels[p] = std::move(feedback->panel);
    factor.curvature.slice(0, ranges[p].begin, ranges[p].end).copy_(feedback->curvature);
  }
  return true;
}

Factor factorize(const at::Tensor& h, const FactorSpec& spec) {
  ISOBATH_CHECK(h.dim() == 2 && h.size(0) == h.size(1), "H must be square");
  check_finite(h);
  Factor factor = factor_of_diagonal(h.diagonal().to(at::kDouble), spec);
  const std::vector<Range> ranges = column_panels(h.size(0), spec.panel_width);
  do {
    if (fill(factor, h, ranges, spec.act_order != ActOrder::none)) return factor;
  } while (raise_damping(factor, spec));
  return factor;
}

at::Tensor upper_root(const Factor& factor) {
  const int64_t n_columns = factor.n_columns();
  at::Tensor root = at::zeros({n_columns, n_columns}, at::kDouble);
  int64_t begin = 0;
  for (const at::Tensor& panel : factor.panels) {
    ISOBATH_CHECK(panel.defined(), "the panel of columns from {} is on another rank", begin);
    root.slice(0, 0, panel.size(0)).slice(1, begin, panel.size(0)).copy_(panel);
    begin = panel.size(0);
  }
  return root.mul_(factor.curvature.sqrt());
}

}  // namespace isobath::quant
