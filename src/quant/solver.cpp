#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/quant/solver.hpp>

#include "group_fit.hpp"

namespace isobath::quant {

void check_weights(const at::Tensor& w, int64_t first_row) {
  ISOBATH_CHECK(w.dim() == 2 && w.scalar_type() == at::kFloat && w.is_cpu(),
                "w must be [R, C] f32 on the CPU");
  if (w.numel() == 0) return;
  // One pass; a NaN becomes both.
  const auto [least, most] = at::aminmax(w);
  if (std::isfinite(least.item<float>()) && std::isfinite(most.item<float>())) return;
  const at::Tensor bad = at::isfinite(w).logical_not();
  const at::Tensor first = bad.nonzero()[0];
  fail<NumericError>(
      "the weight is not finite at row {}, column {}; the checkpoint is damaged or a correction overflowed",
      first_row + first[0].item<int64_t>(), first[1].item<int64_t>());
}

static QuantizedMatrix empty_matrix(int64_t n_rows, int64_t n_columns, const GridSpec& spec) {
  const int64_t groups = n_groups(n_columns, spec);
  return {spec, at::empty({n_rows, n_columns}, at::kChar), at::empty({n_rows, groups}, at::kFloat),
          at::zeros({n_rows, groups}, at::kChar)};
}

static std::span<const float> part_of(const at::Tensor& values, int64_t begin, int64_t n) {
  return {values.const_data_ptr<float>() + begin, static_cast<size_t>(n)};
}

QuantizedMatrix round_to_nearest(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec) {
  check_weights(w);
  const int64_t n_rows = w.size(0), n_columns = w.size(1);
  QuantizedMatrix matrix = empty_matrix(n_rows, n_columns, spec);
  const int64_t groups = matrix.scale.size(1), width = n_columns / groups;
  const at::Tensor weights = w.contiguous();
  at::Tensor column_importance;
  if (importance.defined()) {
    ISOBATH_CHECK(importance.numel() == n_columns, "{} importances for {} columns", importance.numel(),
                  n_columns);
    column_importance = importance.to(at::kFloat).contiguous();
  }
  const float* from = weights.const_data_ptr<float>();
  auto* codes = matrix.codes.mutable_data_ptr<int8_t>();
  auto* scale = matrix.scale.mutable_data_ptr<float>();
  auto* zero = matrix.zero.mutable_data_ptr<int8_t>();
  at::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch;
    for (int64_t group = first; group < last; ++group) {
      const GroupFitter fitter(spec, width,
                               column_importance.defined() ? part_of(column_importance, group * width, width)
                                                           : std::span<const float>());
      fit_rows(fitter, from + group * width, n_columns, n_rows, width, scratch,
               [&](int64_t row, const RowGrid& grid) {
                 const int64_t at = row * n_columns + group * width;
                 encode_row(spec, grid, from + at, width, codes + at);
                 scale[row * groups + group] = grid.scale;
                 zero[row * groups + group] = static_cast<int8_t>(grid.zero);
               });
    }
  });
  matrix.scale = matrix.scale.to(spec.storage);
  return matrix;
}

QuantizedMatrix gptq(const at::Tensor& w, const Factor& factor, const GridSpec& spec) {
  RowSolver solver(w, factor, spec);
  for (const at::Tensor& panel : factor.panels) solver.advance(panel);
  return solver.take();
}

double objective(const at::Tensor& w, const at::Tensor& w_hat, const at::Tensor& h) {
  const at::Tensor difference = w_hat.to(at::kFloat) - w.to(at::kFloat);
  return 0.5 * (difference.mm(h.to(at::kFloat)) * difference).sum(at::kDouble).item<double>();
}

FactoredObjective::FactoredObjective(const at::Tensor& difference, const Factor& factor)
    : factor_(factor),
      errors_(difference.index_select(1, factor.order.to(difference.device())).t().contiguous()) {
  errors_.masked_fill_(factor.dead.index_select(0, factor.order).to(errors_.device()).unsqueeze(1), 0);
}

void FactoredObjective::advance(const at::Tensor& panel) {
  const int64_t end = panel.size(0);
  const at::Tensor products = panel.to(errors_.device()).t().mm(errors_.slice(0, 0, end));
  const at::Tensor curvature = factor_.curvature.slice(0, end - panel.size(1), end).to(errors_.device());
  squares_ += (products.square().sum(1, false, at::kDouble) * curvature).sum().item<double>();
}

double FactoredObjective::value() const {
  const double norm = errors_.square().sum(at::kDouble).item<double>();
  return std::max(0.0, 0.5 * (squares_ - factor_.damping * factor_.mean * norm));
}

}  // namespace isobath::quant
