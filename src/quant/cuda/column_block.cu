#include "grid_step.hpp"
#include "row_threads.hpp"

namespace isobath::quant::cuda {
namespace {

/// Settling: a column moves by what its target differs from the weight.
struct SettledColumn {
  const Block& block;
  float *settled, *shifts;
  int64_t row;
  bool is_inside;

  __device__ void prepare(int, int) const {}
  __device__ float factor(int k, int i) const { return block.feedback[k * kBlockColumns + i]; }
  __device__ float visit(int, int k, float target) const {
    const int64_t at = k * block.n_rows + row;
    const float shift = block.errors[at] - target;
    settled[at] = target;
    shifts[at] = shift;
    return shift;
  }
};

__global__ void __launch_bounds__(kLanes* kWarps)
    settle_kernel(Block block, int begin, int end, float* settled, float* shifts) {
  __shared__ Current targets;
  const int64_t row = row_of_thread();
  load_current(targets, block.targets, block.n_rows, begin, end);
  SettledColumn column{block, settled, shifts, row, row < block.n_rows};
  visit_columns(column, targets, begin, end, end);
}

/// Rounding: a column moves by its error, w − ŵ.
struct RoundedColumn {
  const Block& block;
  const GridRules& rules;
  const Grids& grids;
  const Rounded& rounded;
  Levels (*levels)[kLanes];  ///< of a step's columns, shared
  int (*zeros)[kLanes];
  int64_t row;
  bool is_inside;
  float squares = 0.0F;
  double norm = 0.0;

  __device__ void prepare(int i, int k) const {
    const int64_t grid = rounded.order[k] / rounded.width * block.n_rows + row;
    const int zero = grids.zero[grid], lane = lane_of_thread();
    zeros[i][lane] = zero;
    levels[i][lane] = levels_of(rules, grids.scale[grid], zero);
  }
  __device__ float factor(int k, int i) const { return block.feedback[k * kBlockColumns + i]; }
  __device__ float visit(int i, int k, float target) {
    const int64_t at = k * block.n_rows + row;
    const int lane = lane_of_thread();
    const float step = nearest_step(levels[i][lane], target);
    // The error fed back is that of the weight a loader will see.
    const float stored = round_stored(rules.format, step * levels[i][lane].scale);
    const float missed = target - stored, error = block.errors[at] - stored;
    block.errors[at] = error;
    rounded.codes[rounded.order[k] * block.n_rows + row] =
        static_cast<int8_t>(static_cast<int>(step) + zeros[i][lane]);
    squares = fmaf(block.curvature[k] * missed, missed, squares);
    norm = fma(static_cast<double>(error), static_cast<double>(error), norm);
    return error;
  }
};

__global__ void __launch_bounds__(kLanes* kWarps)
    solve_kernel(Block block, int begin, int end, GridRules rules, Grids grids, Rounded rounded) {
  __shared__ Current targets;
  __shared__ Levels levels[kStep][kLanes];
  __shared__ int zeros[kStep][kLanes];
  const int64_t row = row_of_thread(), n_rows = block.n_rows;
  load_current(targets, block.targets, n_rows, begin, block.n_columns);
  RoundedColumn column{block, rules, grids, rounded, levels, zeros, row, row < n_rows};
  visit_columns(column, targets, begin, end, block.n_columns);
  if (!column.is_inside) return;
  for (int k = end + warp_of_thread(); k < block.n_columns; k += kWarps)
    block.targets[k * n_rows + row] = targets[k][lane_of_thread()];
  if (warp_of_thread() != 0) return;
  rounded.squares[row] += column.squares;
  rounded.norms[row] += column.norm;
}

}  // namespace

int settle_columns(const Block& block, int begin, int end, float* settled, float* shifts, Stream stream) {
  const cudaLaunchConfig_t config = launch_of(block.n_rows, kLanes, stream);
  return cudaLaunchKernelEx(&config, settle_kernel, block, begin, end, settled, shifts);
}

int solve_columns(const Block& block, int begin, int end, const GridRules& rules, Grids grids,
                  const Rounded& rounded, Stream stream) {
  const cudaLaunchConfig_t config = launch_of(block.n_rows, kLanes, stream);
  return cudaLaunchKernelEx(&config, solve_kernel, block, begin, end, rules, grids, rounded);
}

}  // namespace isobath::quant::cuda
