#pragma once
#include <cuda_runtime.h>

#include "columns.hpp"

/// Kernels that visit the columns of a block one after the other, all rows at once.
namespace isobath::quant::cuda {

/// A block of threads takes 32 rows, one a lane. One of its warps visits the columns of a step, which reach
/// each other out of registers; then all warps share the columns behind it.
inline constexpr int kLanes = 32, kWarps = 8, kStep = 16;
inline constexpr unsigned kAllLanes = 0xffffffffU;

__device__ inline int lane_of_thread() {
  return static_cast<int>(threadIdx.x) % kLanes;
}
__device__ inline int warp_of_thread() {
  return static_cast<int>(threadIdx.x) / kLanes;
}
__device__ inline int64_t row_of_thread() {
  return int64_t{blockIdx.x} * kLanes + lane_of_thread();
}

inline cudaLaunchConfig_t launch_of(int64_t n_rows, int rows_of_a_block, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((n_rows + rows_of_a_block - 1) / rows_of_a_block));
  config.blockDim = dim3(kLanes * kWarps);
  config.stream = stream;
  return config;
}

/// A number for each column of a block and row of its threads, in shared memory.
using Current = float[kBlockColumns][kLanes];

/// `from` [columns, n_rows] from column `begin` on.
__device__ inline void load_current(Current& current, const float* from, int64_t n_rows, int begin,
                                    int n_columns) {
  const int64_t row = row_of_thread();
  for (int k = begin + warp_of_thread(); k < n_columns; k += kWarps)
    current[k][lane_of_thread()] = row < n_rows ? from[k * n_rows + row] : 0.0F;
}

/// Visits columns [begin, end). `current` is loaded by the same threads, and up to date behind `end`
/// afterwards. Column has, for this thread's row:
///   is_inside           whether there is one
///   prepare(i, k)       what can be read before column k, the i-th of its step, is visited; by any warp
///   visit(i, k, value)  takes the current number of column k and returns by how much the column moves
///   factor(k, i)        by which a move of column i counts for column k
/// Numbers are added in the order of the moving columns.
template <class Column>
__device__ void visit_columns(Column& column, Current& current, int begin, int end, int n_columns) {
  __shared__ float moves[kStep][kLanes];
  const int lane = lane_of_thread(), warp = warp_of_thread();
  for (int first = begin; first < end; first += kStep) {
    const int n = end - first < kStep ? end - first : kStep;
    if (column.is_inside)
      for (int i = warp; i < n; i += kWarps) column.prepare(i, first + i);
    __syncthreads();
    if (warp == 0 && column.is_inside) {
      float own[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (i >= n) continue;
        float value = current[first + i][lane];
#pragma unroll
        for (int earlier = 0; earlier < i; ++earlier)
          value = fmaf(own[earlier], column.factor(first + i, first + earlier), value);
        own[i] = column.visit(i, first + i, value);
        moves[i][lane] = own[i];
      }
    }
    __syncthreads();
    if (column.is_inside)
      for (int k = first + n + warp; k < n_columns; k += kWarps) {
        float value = current[k][lane];
#pragma unroll
        for (int i = 0; i < kStep; ++i)
          if (i < n) value = fmaf(moves[i][lane], column.factor(k, first + i), value);
        current[k][lane] = value;
      }
  }
  __syncthreads();
}

}  // namespace isobath::quant::cuda
