#include <ATen/ATen.h>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/quant/grid.hpp>

#include "candidates.hpp"
#include "group_fit.hpp"

namespace isobath::quant {

int64_t n_groups(int64_t columns, const GridSpec& spec) {
  check_spec(spec);
  if (spec.group == 0) return 1;
  if (columns % spec.group != 0) {
    fail<ConfigError>(
        "a group of {} does not divide the {} columns of the weight; choose a divisor of {}, or 0 for one "
        "group per row",
        spec.group, columns, columns);
  }
  return columns / spec.group;
}

GroupGrid fit_grid(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec) {
  check_spec(spec);
  ISOBATH_CHECK(w.dim() == 2 && w.scalar_type() == at::kFloat && w.is_cpu(),
                "w must be [R, g] f32 on the CPU");
  const int64_t n_rows = w.size(0), n_columns = w.size(1);
  const at::Tensor weights = w.contiguous();
  std::span<const float> columns;
  at::Tensor importance_f32;
  if (importance.defined()) {
    ISOBATH_CHECK(importance.numel() == n_columns, "{} importances for {} columns", importance.numel(),
                  n_columns);
    importance_f32 = importance.to(at::kFloat).contiguous();
    columns = {importance_f32.const_data_ptr<float>(), static_cast<size_t>(n_columns)};
  }
  at::Tensor scale = at::empty({n_rows}, at::kFloat), zero = at::empty({n_rows}, at::kChar);
  const GroupFitter fitter(spec, n_columns, columns);
  std::vector<float> scratch;
  fit_rows(fitter, weights.const_data_ptr<float>(), n_columns, n_rows, n_columns, scratch,
           [&](int64_t row, const RowGrid& grid) {
             scale.mutable_data_ptr<float>()[row] = grid.scale;
             zero.mutable_data_ptr<int8_t>()[row] = static_cast<int8_t>(grid.zero);
           });
  return {scale.to(spec.storage), zero};
}

at::Tensor dequantize(const QuantizedMatrix& matrix) {
  const int64_t n_rows = matrix.codes.size(0), n_columns = matrix.codes.size(1);
  const int64_t groups = n_groups(n_columns, matrix.spec);
  ISOBATH_CHECK(matrix.scale.size(0) == n_rows && matrix.scale.size(1) == groups &&
                    matrix.zero.sizes() == matrix.scale.sizes(),
                "codes [{}, {}] with group {} need scales and zeros [{}, {}]", n_rows, n_columns,
                matrix.spec.group, n_rows, groups);
  at::Tensor values = at::empty({n_rows, n_columns}, matrix.codes.options().dtype(matrix.spec.storage));
  // Some rows at a time: steps in f32 between codes and values stay small, whatever the matrix.
  constexpr int64_t kRows = 256;
  for (int64_t begin = 0; begin < n_rows; begin += kRows) {
    const int64_t end = std::min(begin + kRows, n_rows);
    const at::Tensor steps =
        matrix.codes.slice(0, begin, end).view({end - begin, groups, -1}).to(at::kFloat) -
        matrix.zero.slice(0, begin, end).unsqueeze(-1);
    values.slice(0, begin, end)
        .copy_((steps * matrix.scale.slice(0, begin, end).to(at::kFloat).unsqueeze(-1))
                   .view({end - begin, n_columns}));
  }
  return values;
}

at::Tensor round_on_grid(const at::Tensor& w, const at::Tensor& scale, const at::Tensor& zero,
                         const GridSpec& spec) {
  const int64_t groups = n_groups(w.size(1), spec);
  ISOBATH_CHECK(scale.size(0) == w.size(0) && scale.size(1) == groups && zero.sizes() == scale.sizes(),
                "weights [{}, {}] with group {} need scales and zeros [{}, {}]", w.size(0), w.size(1),
                spec.group, w.size(0), groups);
  const at::Tensor step = scale.to(at::kFloat).unsqueeze(-1), offset = zero.to(at::kFloat).unsqueeze(-1);
  // at::round takes ties to even, as the kernels that choose codes do.
  at::Tensor levels = w.to(at::kFloat).reshape({w.size(0), groups, -1}).mul(step.reciprocal()).round_();
  if (spec.symmetric)
    levels.clamp_(smallest_code(spec), largest_code(spec));
  else
    levels = at::minimum(at::maximum(levels, smallest_code(spec) - offset), largest_code(spec) - offset);
  return levels.mul_(step).to(spec.storage).to(at::kFloat).view({w.size(0), w.size(1)});
}

double bits_per_weight(int64_t columns, const GridSpec& spec) {
  const double per_group =
      8.0 * static_cast<double>(c10::elementSize(spec.storage)) + (spec.symmetric ? 0 : spec.bits);
  return spec.bits + per_group * static_cast<double>(n_groups(columns, spec)) / static_cast<double>(columns);
}

}  // namespace isobath::quant
