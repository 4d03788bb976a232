#pragma once
#include <cuda_runtime.h>

#include "columns.hpp"

/// Kernels in which a thread takes a row.
namespace isobath::quant::cuda {

inline constexpr int kRowThreads = 64;

/// Columns that reach each other out of registers; those behind them follow together.
inline constexpr int kStep = 16;

__device__ inline int64_t row_of_thread() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

inline cudaLaunchConfig_t launch_of_rows(int64_t n_rows, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((n_rows + kRowThreads - 1) / kRowThreads));
  config.blockDim = dim3(kRowThreads);
  config.stream = stream;
  return config;
}

}  // namespace isobath::quant::cuda
