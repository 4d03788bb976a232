#include "refine.hpp"

#include "grid_step.hpp"
#include "row_threads.hpp"

namespace isobath::quant::cuda {
namespace {

/// Columns whose changes reach each other out of registers; those behind them follow together.
constexpr int kStep = 16;

/// A gradient after what the first n of `changes`, those of the columns from `first` on, do to column k.
__device__ float moved(float gradient, const float (&changes)[kStep], int n, const RefinedColumns& columns,
                       int k, int first) {
#pragma unroll
  for (int i = 0; i < kStep; ++i)
    if (i < n) gradient = fmaf(changes[i], columns.curvature[(first + i) * columns.stride + k], gradient);
  return gradient;
}

__global__ void __launch_bounds__(kRowThreads)
    codes_kernel(RefinedColumns columns, const int64_t* order, int64_t width, GridRules rules, Grids grids) {
  const int64_t row = row_of_thread(), n_rows = columns.n_rows;
  if (row >= n_rows) return;
  for (int first = 0; first < columns.n_columns; first += kStep) {
    const int n = columns.n_columns - first < kStep ? columns.n_columns - first : kStep;
    float changes[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i >= n) continue;
      const int k = first + i;
      const int64_t at = k * n_rows + row, grid = order[k] / width * n_rows + row;
      const float curvature = columns.curvature[k * columns.stride + k];
      changes[i] = 0.0F;
      if (curvature > 0.0F) {
        const Levels levels = levels_of(rules, grids.scale[grid], grids.zero[grid]);
        const float gradient = moved(columns.gradients[at], changes, i, columns, k, first);
        const float value = columns.values[at];
        const float step = nearest_step(levels, value - gradient * (1.0F / curvature));
        const float stored = round_stored(rules.format, step * levels.scale);
        const float change = stored - value;
        // The stored value is rounded, so the nearest code is not always an improvement.
        if (change * (gradient + 0.5F * curvature * change) < 0.0F) {
          columns.values[at] = stored;
          columns.steps[at] = step;
          changes[i] = change;
        }
      }
      columns.changes[at] = changes[i];
    }
    for (int k = first + n; k < columns.n_columns; ++k) {
      float* gradient = columns.gradients + k * n_rows + row;
      *gradient = moved(*gradient, changes, n, columns, k, first);
    }
  }
}

/// One row of a group.
struct GroupRow {
  const RefinedColumns& group;
  const float* is_live;
  const GridRules& rules;
  int64_t row;

  __device__ float value(int j) const { return group.values[j * group.n_rows + row]; }
  /// With the zero point moved by `shift`.
  __device__ float step(int j, int shift) const {
    return group.steps[j * group.n_rows + row] - is_live[j] * static_cast<float>(shift);
  }
  __device__ float stored(int j, int shift, float scale) const {
    return round_stored(rules.format, step(j, shift) * scale);
  }
  __device__ float gradient(int j) const { return group.gradients[j * group.n_rows + row]; }
  __device__ float curvature(int j, int k) const { return group.curvature[j * group.stride + k]; }
};

/// The scale at which the objective of the codes is least; `scale` where there is none.
__device__ float best_scale(const GroupRow& at, int shift, float scale) {
  // d/ds of the objective of s·k is 0: s = kᵀ(H u − g)/(kᵀ H k), u the values now.
  float cross = 0.0F, square = 0.0F;
  for (int j = 0; j < at.group.n_columns; ++j) {
    float of_values = 0.0F, of_steps = 0.0F;
    for (int k = 0; k < at.group.n_columns; ++k) {
      of_values = fmaf(at.curvature(j, k), at.value(k), of_values);
      of_steps = fmaf(at.curvature(j, k), at.step(k, shift), of_steps);
    }
    cross = fmaf(at.step(j, shift), of_values - at.gradient(j), cross);
    square = fmaf(at.step(j, shift), of_steps, square);
  }
  return square > 0.0F && cross > 0.0F ? storable_scale(at.rules, cross / square) : scale;
}

/// By how much the objective changes on another grid.
__device__ float change_on(const GroupRow& at, int shift, float scale) {
  float change = 0.0F;
  for (int j = 0; j < at.group.n_columns; ++j) {
    float of_deltas = 0.0F;
    for (int k = 0; k < at.group.n_columns; ++k)
      of_deltas = fmaf(at.curvature(j, k), at.stored(k, shift, scale) - at.value(k), of_deltas);
    change = fmaf(at.stored(j, shift, scale) - at.value(j), at.gradient(j) + 0.5F * of_deltas, change);
  }
  return change;
}

__global__ void __launch_bounds__(kRowThreads)
    grid_kernel(RefinedColumns group, const float* is_live, GridRules rules, Grids grids) {
  const int64_t row = row_of_thread(), n_rows = group.n_rows;
  if (row >= n_rows) return;
  const GroupRow at{group, is_live, rules, row};
  const int shifts[3] = {0, -1, 1};
  const int zero = grids.zero[row];
  float best_change = 0.0F, scale = grids.scale[row];
  const float old_scale = scale;
  int best_shift = 0;
  for (int i = 0; i < (rules.is_symmetric ? 1 : 3); ++i) {
    const int shift = shifts[i];
    if (zero + shift < smallest_code(rules) || zero + shift > largest_code(rules)) continue;
    const float tried = best_scale(at, shift, old_scale), change = change_on(at, shift, tried);
    if (!(change < best_change)) continue;
    best_change = change;
    best_shift = shift;
    scale = tried;
  }
  for (int j = 0; j < group.n_columns; ++j) {
    const int64_t place = j * n_rows + row;
    const float before = group.values[place];
    if (best_change < 0.0F) {
      group.values[place] = at.stored(j, best_shift, scale);
      group.steps[place] = at.step(j, best_shift);
    }
    group.changes[place] = group.values[place] - before;
  }
  grids.scale[row] = scale;
  grids.zero[row] = static_cast<int8_t>(zero + best_shift);
}

}  // namespace

int refine_codes(const RefinedColumns& columns, const int64_t* order, int64_t width, const GridRules& rules,
                 Grids grids, Stream stream) {
  const cudaLaunchConfig_t config = launch_of_rows(columns.n_rows, stream);
  return cudaLaunchKernelEx(&config, codes_kernel, columns, order, width, rules, grids);
}

int refine_grid(const RefinedColumns& group, const float* is_live, const GridRules& rules, Grids grids,
                Stream stream) {
  const cudaLaunchConfig_t config = launch_of_rows(group.n_rows, stream);
  return cudaLaunchKernelEx(&config, grid_kernel, group, is_live, rules, grids);
}

}  // namespace isobath::quant::cuda
