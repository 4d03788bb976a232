#include <ATen/ATen.h>

#include <cmath>
#include <isobath/quant/reference.hpp>

#include "../candidates.hpp"

namespace isobath::quant::reference {

QuantizedMatrix gptq(const at::Tensor& w, const at::Tensor& h, const FactorSpec& factor,
                     const GridSpec& spec) {
  const int64_t n_rows = w.size(0), n_columns = w.size(1);
  const int64_t groups = n_groups(n_columns, spec), width = n_columns / groups;
  const at::Tensor diagonal = h.diagonal().to(at::kDouble);
  const at::Tensor dead = diagonal == 0;
  const at::Tensor order = factor.act_order == ActOrder::static_groups
                               ? std::get<1>(at::sort(diagonal, /*stable=*/true, 0, /*descending=*/true))
                               : at::arange(n_columns, at::kLong);

  const double mean = diagonal.sum().item<double>() / static_cast<double>((~dead).sum().item<int64_t>());
  at::Tensor damped = h.to(at::kDouble).clone();
  damped.diagonal().add_(factor.damping * mean + mean * dead.to(at::kDouble));
  damped = damped.index_select(0, order).index_select(1, order);
  const at::Tensor upper = at::linalg_cholesky(at::linalg_inv(damped), /*upper=*/true);
  at::Tensor importance = at::empty({n_columns}, at::kDouble);
  importance.index_copy_(0, order, 1 / upper.diagonal().square());

  const at::Tensor original = w.to(at::kDouble).masked_fill(dead.unsqueeze(0), 0);
  at::Tensor current = original.index_select(1, order).contiguous();
  QuantizedMatrix matrix{spec, at::zeros({n_rows, n_columns}, at::kChar),
                         at::zeros({n_rows, groups}, spec.storage), at::zeros({n_rows, groups}, at::kChar)};
  const auto fit = [&](int64_t group, const at::Tensor& columns) {
    const GroupGrid grid = reference::fit_grid(columns, importance.narrow(0, group * width, width), spec);
    matrix.scale.select(1, group).copy_(grid.scale);
    matrix.zero.select(1, group).copy_(grid.zero);
  };
  const bool is_static = factor.act_order == ActOrder::static_groups;
  if (is_static) {
    for (int64_t group = 0; group < groups; ++group) fit(group, original.narrow(1, group * width, width));
  }

  for (int64_t i = 0; i < n_columns; ++i) {
    const auto column = order[i].item<int64_t>();
    const int64_t group = column / width;
    if (!is_static && i % width == 0) fit(group, current.narrow(1, i, width));
    const at::Tensor scale = matrix.scale.select(1, group).to(at::kDouble);
    const at::Tensor zero = matrix.zero.select(1, group).to(at::kDouble);
    const at::Tensor codes =
        (at::round(current.select(1, i) / scale) + zero).clamp(smallest_code(spec), largest_code(spec));
    const at::Tensor stored = ((codes - zero) * scale).to(spec.storage).to(at::kDouble);
    const at::Tensor error = (current.select(1, i) - stored) / upper[i][i];
    current.narrow(1, i, n_columns - i)
        .sub_(error.unsqueeze(1) * upper[i].narrow(0, i, n_columns - i).unsqueeze(0));
    matrix.codes.select(1, column).copy_(codes);
  }
  return matrix;
}

}  // namespace isobath::quant::reference
