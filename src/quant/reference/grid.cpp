#include <ATen/ATen.h>

#include <cmath>
#include <isobath/quant/reference.hpp>
#include <limits>

#include "../candidates.hpp"
#include "stored.hpp"

namespace isobath::quant::reference {

namespace {

struct Grid {
  double scale;
  int zero;
};

struct Problem {
  const GridSpec& spec;
  std::vector<double> weights, importance;
  double min, max;
};

/// Steps from the zero point of the nearest level.
double nearest(const Problem& problem, const Grid& grid, double weight) {
  return std::nearbyint(std::clamp(weight / grid.scale, 1.0 * smallest_code(problem.spec) - grid.zero,
                                   1.0 * largest_code(problem.spec) - grid.zero));
}

double error(const Problem& problem, const Grid& grid) {
  double sum = 0;
  for (size_t j = 0; j < problem.weights.size(); ++j) {
    const double w = problem.weights[j];
    const double difference = w - stored(nearest(problem, grid, w) * grid.scale, problem.spec.storage);
    sum += problem.importance[j] * difference * difference;
  }
  return sum;
}

double least_squares_scale(const Problem& problem, const Grid& grid) {
  double cross = 0, square = 0;
  for (size_t j = 0; j < problem.weights.size(); ++j) {
    const double steps = nearest(problem, grid, problem.weights[j]);
    cross += problem.importance[j] * steps * problem.weights[j];
    square += problem.importance[j] * steps * steps;
  }
  return square > 0 ? cross / square : 0;
}

Grid min_max(const Problem& problem) {
  const GridSpec& spec = problem.spec;
  const double span = (1 << spec.bits) - 1;
  if (problem.min == problem.max) return {1, spec.symmetric ? 0 : smallest_code(spec)};
  if (spec.symmetric) return {stored(std::max(problem.max, -problem.min) / (span / 2), spec.storage), 0};
  const double scale = stored((problem.max - problem.min) / span, spec.storage);
  return {scale, static_cast<int>(std::nearbyint(smallest_code(spec) - problem.min / scale))};
}

std::vector<Grid> candidates(const Problem& problem) {
  const GridSpec& spec = problem.spec;
  std::vector<Grid> grids{min_max(problem)};
  const double start = spec.symmetric
                           ? std::max(problem.max / largest_code(spec), problem.min / smallest_code(spec))
                           : (problem.max - problem.min) / ((1 << spec.bits) - 1);
  for (const float factor : shrink_factors(spec)) {
    const double scale = stored(start * factor, spec.storage);
    if (spec.symmetric) {
      grids.push_back({scale, 0});
      continue;
    }
    const ZeroRange zeros = zero_candidates(spec, problem.min, problem.max, scale);
    for (int zero = zeros.first; zero < zeros.last; zero += zeros.step) grids.push_back({scale, zero});
    grids.push_back({scale, zeros.last});
  }
  return grids;
}

Grid best_of(const Problem& problem, const std::vector<Grid>& grids) {
  Grid best = grids.front();
  double best_error = std::numeric_limits<double>::infinity();
  for (const Grid& grid : grids) {
    const double grid_error = error(problem, grid);
    if (grid_error < best_error) {
      best = grid;
      best_error = grid_error;
    }
  }
  return best;
}

Grid fit(const Problem& problem) {
  if (!problem.spec.clip_search || problem.min == problem.max) return min_max(problem);
  Grid best = best_of(problem, candidates(problem));
  for (int round = 0; round < kRefinements; ++round) {
    const double scale = stored(least_squares_scale(problem, best), problem.spec.storage);
    if (!(scale > 0)) return best;
    std::vector<Grid> grids{best, {scale, best.zero}};
    if (!problem.spec.symmetric) {
      if (best.zero > smallest_code(problem.spec)) grids.push_back({scale, best.zero - 1});
      if (best.zero < largest_code(problem.spec)) grids.push_back({scale, best.zero + 1});
    }
    const Grid refined = best_of(problem, grids);
    if (refined.scale == best.scale && refined.zero == best.zero) return best;
    best = refined;
  }
  return best;
}

}  // namespace

GroupGrid fit_grid(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec) {
  const at::Tensor weights = w.to(at::kDouble).contiguous();
  const int64_t n_rows = w.size(0), n_columns = w.size(1);
  const at::Tensor column_importance =
      importance.defined() ? importance.to(at::kDouble).contiguous() : at::ones({n_columns}, at::kDouble);
  at::Tensor scale = at::empty({n_rows}, at::kDouble), zero = at::empty({n_rows}, at::kChar);
  for (int64_t row = 0; row < n_rows; ++row) {
    const double* values = weights.const_data_ptr<double>() + row * n_columns;
    const double* h = column_importance.const_data_ptr<double>();
    const Problem problem{spec,
                          {values, values + n_columns},
                          {h, h + n_columns},
                          std::min(0.0, *std::min_element(values, values + n_columns)),
                          std::max(0.0, *std::max_element(values, values + n_columns))};
    const Grid grid = fit(problem);
    scale[row] = grid.scale;
    zero[row] = grid.zero;
  }
  return {scale.to(spec.storage), zero};
}

}  // namespace isobath::quant::reference
