#include <ATen/ATen.h>

#include <cmath>
#include <isobath/quant/reference.hpp>

#include "../candidates.hpp"
#include "stored.hpp"

namespace isobath::quant::reference {

namespace {

/// One row: its weights as a loader sees them, and ½ (ŵ−t)ᵀ H (ŵ−t) from scratch.
struct Row {
  const GridSpec& spec;
  int64_t width;
  std::vector<double> target;
  std::vector<std::vector<double>> h;
  std::vector<int> codes;
  std::vector<double> scale;
  std::vector<int> zero;

  [[nodiscard]] bool is_live(size_t j) const { return h[j][j] > 0; }
  [[nodiscard]] double value(size_t j) const {
    const size_t group = j / static_cast<size_t>(width);
    return is_live(j) ? stored((codes[j] - zero[group]) * scale[group], spec.storage) : 0;
  }
  [[nodiscard]] double objective() const {
    std::vector<double> difference(target.size());
    for (size_t j = 0; j < target.size(); ++j) difference[j] = is_live(j) ? value(j) - target[j] : 0;
    double sum = 0;
    for (size_t j = 0; j < target.size(); ++j)
      for (size_t k = 0; k < target.size(); ++k) sum += 0.5 * difference[j] * h[j][k] * difference[k];
    return sum;
  }

  bool move_code(size_t j) {
    const int before = codes[j];
    int best = before;
    double best_objective = objective();
    for (int code = smallest_code(spec); code <= largest_code(spec); ++code) {
      codes[j] = code;
      const double reached = objective();
      if (reached < best_objective) {
        best = code;
        best_objective = reached;
      }
    }
    codes[j] = best;
    return best != before;
  }

  /// The scale at which the derivative of the objective of s·k, all else as it is, vanishes; 0: none.
  [[nodiscard]] double least_squares_scale(size_t group) const {
    const size_t begin = group * static_cast<size_t>(width), end = begin + static_cast<size_t>(width);
    double cross = 0, square = 0;
    for (size_t j = begin; j < end; ++j) {
      if (!is_live(j)) continue;
      const double step = codes[j] - zero[group];
      for (size_t k = 0; k < target.size(); ++k) {
        const bool is_inside = k >= begin && k < end;
        if (!is_live(k)) continue;
        cross -= step * h[j][k] * (is_inside ? -target[k] : value(k) - target[k]);
        if (is_inside) square += step * h[j][k] * (codes[k] - zero[group]);
      }
    }
    return square > 0 && cross > 0 ? stored(cross / square, spec.storage) : 0;
  }

  bool move_grid(size_t group) {
    const double old_scale = scale[group];
    const int old_zero = zero[group];
    double best_scale = old_scale, best_objective = objective();
    int best_shift = 0;
    const auto shift_codes = [&](int shift) {
      // A dead column stays at the zero point.
      for (size_t j = group * static_cast<size_t>(width); j < (group + 1) * static_cast<size_t>(width); ++j)
        if (!is_live(j)) codes[j] += shift;
      zero[group] += shift;
    };
    for (const int shift : {0, -1, 1}) {
      if (shift != 0 && spec.symmetric) continue;
      if (old_zero + shift < smallest_code(spec) || old_zero + shift > largest_code(spec)) continue;
      shift_codes(shift);
      const double optimum = least_squares_scale(group);
      scale[group] = optimum > 0 ? optimum : old_scale;
      const double reached = objective();
      if (reached < best_objective) {
        best_objective = reached;
        best_scale = scale[group];
        best_shift = shift;
      }
      shift_codes(-shift);
      scale[group] = old_scale;
    }
    shift_codes(best_shift);
    scale[group] = best_scale;
    return best_shift != 0 || best_scale != old_scale;
  }
};

}  // namespace

QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target, const at::Tensor& h,
                       int64_t sweeps, const std::vector<Range>& slabs) {
  const int64_t n_rows = target.size(0), n_columns = target.size(1);
  const int64_t groups = n_groups(n_columns, start.spec);
  QuantizedMatrix matrix{start.spec, start.codes.clone(), start.scale.clone(), start.zero.clone()};
  std::vector<std::vector<double>> curvature;
  for (int64_t j = 0; j < n_columns; ++j) {
    const at::Tensor of_column = h[j].to(at::kDouble).contiguous();
    const double* values = of_column.const_data_ptr<double>();
    curvature.emplace_back(values, values + n_columns);
  }
  for (int64_t r = 0; r < n_rows; ++r) {
    Row row{start.spec, n_columns / groups, {}, curvature, {}, {}, {}};
    for (int64_t j = 0; j < n_columns; ++j) {
      row.target.push_back(target[r][j].item<double>());
      row.codes.push_back(start.codes[r][j].item<int>());
    }
    for (int64_t group = 0; group < groups; ++group) {
      row.scale.push_back(start.scale[r][group].item<double>());
      row.zero.push_back(start.zero[r][group].item<int>());
    }
    for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
      bool any = false;
      for (const Range& slab : slabs) {
        for (int64_t j = slab.begin; j < slab.end; ++j)
          if (row.is_live(static_cast<size_t>(j))) any |= row.move_code(static_cast<size_t>(j));
        for (int64_t group = 0; group < groups; ++group)
          if (group * row.width >= slab.begin && (group + 1) * row.width <= slab.end)
            any |= row.move_grid(static_cast<size_t>(group));
      }
      if (!any) break;
    }
    for (int64_t j = 0; j < n_columns; ++j) matrix.codes[r][j] = row.codes[static_cast<size_t>(j)];
    for (int64_t group = 0; group < groups; ++group) {
      matrix.scale[r][group] = row.scale[static_cast<size_t>(group)];
      matrix.zero[r][group] = row.zero[static_cast<size_t>(group)];
    }
  }
  return matrix;
}

}  // namespace isobath::quant::reference
