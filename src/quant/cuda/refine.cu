#include "refine.hpp"

#include "grid_step.hpp"
#include "row_threads.hpp"

namespace isobath::quant::cuda {
namespace {

/// Refining: a column moves by the change of its value, and moves gradients.
struct RefinedColumn {
  const RefinedColumns& columns;
  const int64_t* order;
  int64_t width;
  const GridRules& rules;
  const Grids& grids;
  Levels (*levels)[kLanes];  ///< of a step's columns, shared
  int64_t row;
  bool is_inside;

  __device__ float curvature(int i, int k) const { return columns.curvature[i * columns.stride + k]; }
  __device__ float factor(int k, int i) const { return curvature(i, k); }
  __device__ void prepare(int i, int k) const {
    const int64_t grid = order[k] / width * columns.n_rows + row;
    levels[i][lane_of_thread()] = levels_of(rules, grids.scale[grid], grids.zero[grid]);
  }
  __device__ float visit(int i, int k, float gradient) const {
    const int64_t at = k * columns.n_rows + row;
    const float own = curvature(k, k);
    float change = 0.0F;
    if (own > 0.0F) {
      const Levels& level = levels[i][lane_of_thread()];
      const float value = columns.values[at];
      const float step = nearest_step(level, value - gradient * (1.0F / own));
      const float stored = round_stored(rules.format, step * level.scale), wanted = stored - value;
      // The stored value is rounded, so the nearest code is not always an improvement.
      if (wanted * (gradient + 0.5F * own * wanted) < 0.0F) {
        columns.values[at] = stored;
        columns.steps[at] = step;
        change = wanted;
      }
    }
    columns.changes[at] = change;
    return change;
  }
};

__global__ void __launch_bounds__(kLanes* kWarps)
    codes_kernel(RefinedColumns columns, const int64_t* order, int64_t width, GridRules rules, Grids grids) {
  __shared__ Current gradients;
  __shared__ Levels levels[kStep][kLanes];
  const int64_t row = row_of_thread();
  load_current(gradients, columns.gradients, columns.n_rows, 0, columns.n_columns);
  RefinedColumn column{columns, order, width, rules, grids, levels, row, row < columns.n_rows};
  visit_columns(column, gradients, 0, columns.n_columns, columns.n_columns);
}

/// One row of a group; its columns are dealt to the lanes of a warp.
struct GroupRow {
  const RefinedColumns& group;
  const float* is_live;
  const GridRules& rules;
  int64_t row;

  __device__ int64_t place(int j) const { return j * group.n_rows + row; }
  __device__ float value(int j) const { return group.values[place(j)]; }
  /// With the zero point moved by `shift`.
  __device__ float step(int j, int shift) const {
    return group.steps[place(j)] - is_live[j] * static_cast<float>(shift);
  }
  __device__ float stored(int j, int shift, float scale) const {
    return round_stored(rules.format, step(j, shift) * scale);
  }
  __device__ float gradient(int j) const { return group.gradients[place(j)]; }
  /// Of columns j and k, which have the same bits either way: lanes read side by side.
  __device__ float curvature(int j, int k) const { return group.curvature[k * group.stride + j]; }
};

/// sum + Σ a_l b_l over the first n lanes, in their order; the same in every lane.
__device__ float add_in_order(float sum, float a, float b, int n) {
  __shared__ float parts[kWarps][2][kLanes];
  float(&own)[2][kLanes] = parts[warp_of_thread()];
  own[0][lane_of_thread()] = a;
  own[1][lane_of_thread()] = b;
  __syncwarp();
  for (int lane = 0; lane < n; ++lane) sum = fmaf(own[0][lane], own[1][lane], sum);
  __syncwarp();
  return sum;
}

/// The scale at which the objective of the codes is least; `scale` where there is none.
__device__ float best_scale(const GroupRow& at, int shift, float scale) {
  // d/ds of the objective of s·k is 0: s = kᵀ(H u − g)/(kᵀ H k), u the values now.
  const int n_columns = at.group.n_columns;
  float cross = 0.0F, square = 0.0F;
  for (int first = 0; first < n_columns; first += kLanes) {
    const int j = first + lane_of_thread(), n = n_columns - first < kLanes ? n_columns - first : kLanes;
    float step = 0.0F, of_values = 0.0F, of_steps = 0.0F;
    if (j < n_columns) {
      step = at.step(j, shift);
      for (int k = 0; k < n_columns; ++k) {
        const float curvature = at.curvature(j, k);
        of_values = fmaf(curvature, at.value(k), of_values);
        of_steps = fmaf(curvature, at.step(k, shift), of_steps);
      }
      of_values -= at.gradient(j);
    }
    cross = add_in_order(cross, step, of_values, n);
    square = add_in_order(square, step, of_steps, n);
  }
  return square > 0.0F && cross > 0.0F ? storable_scale(at.rules, cross / square) : scale;
}

/// By how much the objective changes on another grid. Overwrites the row's changes.
__device__ float change_on(const GroupRow& at, int shift, float scale) {
  const int n_columns = at.group.n_columns;
  __syncwarp();
  for (int j = lane_of_thread(); j < n_columns; j += kLanes)
    at.group.changes[at.place(j)] = at.stored(j, shift, scale) - at.value(j);
  __syncwarp();
  float change = 0.0F;
  for (int first = 0; first < n_columns; first += kLanes) {
    const int j = first + lane_of_thread(), n = n_columns - first < kLanes ? n_columns - first : kLanes;
    float delta = 0.0F, slope = 0.0F;
    if (j < n_columns) {
      float of_deltas = 0.0F;
      for (int k = 0; k < n_columns; ++k)
        of_deltas = fmaf(at.curvature(j, k), at.group.changes[at.place(k)], of_deltas);
      delta = at.group.changes[at.place(j)];
      slope = at.gradient(j) + 0.5F * of_deltas;
    }
    change = add_in_order(change, delta, slope, n);
  }
  return change;
}

/// A warp has a row.
__global__ void __launch_bounds__(kLanes* kWarps)
    grid_kernel(RefinedColumns group, const float* is_live, GridRules rules, Grids grids) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp_of_thread(), n_rows = group.n_rows;
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
  __syncwarp();
  for (int j = lane_of_thread(); j < group.n_columns; j += kLanes) {
    const int64_t place = at.place(j);
    const float before = group.values[place];
    if (best_change < 0.0F) {
      group.values[place] = at.stored(j, best_shift, scale);
      group.steps[place] = at.step(j, best_shift);
    }
    group.changes[place] = group.values[place] - before;
  }
  if (lane_of_thread() != 0) return;
  grids.scale[row] = scale;
  grids.zero[row] = static_cast<int8_t>(zero + best_shift);
}

}  // namespace

int refine_codes(const RefinedColumns& columns, const int64_t* order, int64_t width, const GridRules& rules,
                 Grids grids, Stream stream) {
  const cudaLaunchConfig_t config = launch_of(columns.n_rows, kLanes, stream);
  return cudaLaunchKernelEx(&config, codes_kernel, columns, order, width, rules, grids);
}

int refine_grid(const RefinedColumns& group, const float* is_live, const GridRules& rules, Grids grids,
                Stream stream) {
  const cudaLaunchConfig_t config = launch_of(group.n_rows, kWarps, stream);
  return cudaLaunchKernelEx(&config, grid_kernel, group, is_live, rules, grids);
}

}  // namespace isobath::quant::cuda
