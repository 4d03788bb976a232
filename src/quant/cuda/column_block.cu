#include "grid_step.hpp"
#include "row_threads.hpp"

namespace isobath::quant::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads)
    settle_kernel(Block block, int begin, int end, float* settled, float* shifts) {
  const int64_t row = row_of_thread(), n_rows = block.n_rows;
  if (row >= n_rows) return;
  for (int k = begin; k < end; ++k) {
    const int64_t at = k * n_rows + row;
    float sum = block.targets[at];
    for (int i = begin; i < k; ++i)
      sum = fmaf(shifts[i * n_rows + row], block.feedback[k * kBlockColumns + i], sum);
    settled[at] = sum;
    shifts[at] = block.errors[at] - sum;
  }
}

/// target and what the first n of `errors`, those of the columns from `first` on, feed to column k.
__device__ float fed(float target, const float (&errors)[kStep], int n, const Block& block, int k,
                     int first) {
  const float* factors = block.feedback + k * kBlockColumns + first;
#pragma unroll
  for (int i = 0; i < kStep; ++i)
    if (i < n) target = fmaf(errors[i], factors[i], target);
  return target;
}

__global__ void __launch_bounds__(kRowThreads)
    solve_kernel(Block block, int begin, int end, GridRules rules, Grids grids, Rounded rounded) {
  const int64_t row = row_of_thread(), n_rows = block.n_rows;
  if (row >= n_rows) return;
  float squares = 0.0F;
  double norm = 0.0;
  for (int first = begin; first < end; first += kStep) {
    const int n = end - first < kStep ? end - first : kStep;
    float errors[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i >= n) continue;
      const int k = first + i;
      const int64_t at = k * n_rows + row, column = rounded.order[k],
                    grid = column / rounded.width * n_rows + row;
      const int zero = grids.zero[grid];
      const Levels levels = levels_of(rules, grids.scale[grid], zero);
      const float target = fed(block.targets[at], errors, i, block, k, first);
      const float step = nearest_step(levels, target);
      // The error fed back is that of the weight a loader will see.
      const float stored = round_stored(rules.format, step * levels.scale);
      const float missed = target - stored;
      errors[i] = block.errors[at] - stored;
      block.errors[at] = errors[i];
      rounded.codes[column * n_rows + row] = static_cast<int8_t>(static_cast<int>(step) + zero);
      squares = fmaf(block.curvature[k] * missed, missed, squares);
      norm = fma(static_cast<double>(errors[i]), static_cast<double>(errors[i]), norm);
    }
    for (int k = first + n; k < block.n_columns; ++k) {
      float* target = block.targets + k * n_rows + row;
      *target = fed(*target, errors, n, block, k, first);
    }
  }
  rounded.squares[row] += squares;
  rounded.norms[row] += norm;
}

}  // namespace

int settle_columns(const Block& block, int begin, int end, float* settled, float* shifts, Stream stream) {
  const cudaLaunchConfig_t config = launch_of_rows(block.n_rows, stream);
  return cudaLaunchKernelEx(&config, settle_kernel, block, begin, end, settled, shifts);
}

int solve_columns(const Block& block, int begin, int end, const GridRules& rules, Grids grids,
                  const Rounded& rounded, Stream stream) {
  const cudaLaunchConfig_t config = launch_of_rows(block.n_rows, stream);
  return cudaLaunchKernelEx(&config, solve_kernel, block, begin, end, rules, grids, rounded);
}

}  // namespace isobath::quant::cuda
