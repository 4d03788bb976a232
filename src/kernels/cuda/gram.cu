#include "gram.hpp"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <algorithm>

namespace isobath::kernels::cuda {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kThreads = 256, kLanes = 32;

cudaLaunchConfig_t launch_of(dim3 grid, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return config;
}

unsigned n_blocks(int64_t n, int64_t size) {
  return static_cast<unsigned>((n + size - 1) / size);
}

__device__ float value_of(float x) {
  return x;
}
__device__ float value_of(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

/// Whether a value may be used; stores it rounded.
__device__ bool put(float value, float* to) {
  constexpr float kLargest = 0x1p50F;
  *to = value;
  return fabsf(value) <= kLargest;
}
__device__ bool put(float value, uint16_t* to) {
  const uint32_t bits = __float_as_uint(value);
  // To nearest even. Infinity stays, NaN becomes one or infinity: neither may be used.
  const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  *to = static_cast<uint16_t>(rounded);
  return (bits & 0x7f800000U) != 0x7f800000U && (rounded & 0x7f80U) != 0x7f80U;
}

/// A thread takes a channel, and every gridDim.y-th token.
template <class Scalar>
__global__ void weigh_kernel(Rows<const Scalar> x, const float* roots, Rows<Scalar> to, int* is_bad) {
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (channel >= to.n_channels) return;
  bool is_usable = true;
  for (int64_t token = blockIdx.y; token < to.n_tokens; token += gridDim.y) {
    const bool is_inside = token < x.n_tokens && channel < x.n_channels;
    const float root = is_inside && roots != nullptr ? roots[token] : 1.0F;
    const float value =
        is_inside && root != 0.0F ? value_of(x.data[token * x.stride + channel]) * root : 0.0F;
    is_usable &= put(value, to.data + token * to.stride + channel);
  }
  if (!is_usable) atomicOr(is_bad, 1);
}

template <class Scalar>
int weigh(Rows<const Scalar> x, const float* roots, Rows<Scalar> to, int* is_bad, Stream stream) {
  constexpr int64_t kMostRows = 4096;  // of a launch
  const dim3 grid(n_blocks(to.n_channels, kThreads), static_cast<unsigned>(std::min(to.n_tokens, kMostRows)));
  const cudaLaunchConfig_t config = launch_of(grid, stream);
  return cudaLaunchKernelEx(&config, weigh_kernel<Scalar>, x, roots, to, is_bad);
}

/// Whether nothing of the tile of `size` rows and columns from (row, column) on is asked for.
__device__ bool is_below(const Sum& sum, int64_t row, int64_t column, int64_t size) {
  const int64_t last = column + size < sum.n_columns ? column + size : sum.n_columns;
  return sum.is_upper && row >= sum.first_column + last;
}

// bf16: a block makes a tile of 128 × 128, each of its 8 warps 64 × 32 of it.
constexpr int kTile = 128, kPitch = kTile + 8;  // rows of shared memory that start in different banks
constexpr int kWarpRows = 64, kWarpColumns = 32, kFragment = 16;
constexpr int kRowFragments = kWarpRows / kFragment, kColumnFragments = kWarpColumns / kFragment;
constexpr int kTileWords = kTokenStep * kPitch;
constexpr int kVectors = kTokenStep * kTile / kChannelStep / kThreads;  // of 16 bytes, a thread and step
/// Sums of 256 tokens are finished before they meet the total, as on the CPU: tensor cores cut low bits off,
/// and a short sum loses less.
constexpr int kStepsPerPass = 256 / kTokenStep;
constexpr int kStagePitch = kFragment + 4;

using RowFragment = wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::col_major>;
using ColumnFragment = wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::row_major>;
using SumFragment = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

/// This thread's part of a step: kTokenStep tokens of the kTile channels from `first` on.
__device__ void fetch(const Rows<const uint16_t>& from, int64_t token, int64_t first, uint4* vectors) {
  for (int v = 0; v < kVectors; ++v) {
    const int at = static_cast<int>(threadIdx.x) + v * kThreads;
    const int64_t channel = first + at % (kTile / kChannelStep) * kChannelStep;
    const uint16_t* data = from.data + (token + at / (kTile / kChannelStep)) * from.stride + channel;
    vectors[v] = channel < from.stride ? *reinterpret_cast<const uint4*>(data) : uint4{0, 0, 0, 0};
  }
}
__device__ void keep(const uint4* vectors, __nv_bfloat16* tile) {
  for (int v = 0; v < kVectors; ++v) {
    const int at = static_cast<int>(threadIdx.x) + v * kThreads;
    const int channel = at % (kTile / kChannelStep) * static_cast<int>(kChannelStep);
    *reinterpret_cast<uint4*>(tile + at / (kTile / kChannelStep) * kPitch + channel) = vectors[v];
  }
}

/// Adds the products of one step to the fragments of a warp at (row, column) of the tile.
__device__ void multiply(const __nv_bfloat16* rows, const __nv_bfloat16* columns, int row, int column,
                         SumFragment (&sums)[kRowFragments][kColumnFragments]) {
#pragma unroll
  for (int k = 0; k < kTokenStep; k += kFragment) {
    RowFragment left[kRowFragments];
    ColumnFragment right[kColumnFragments];
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
      wmma::load_matrix_sync(left[i], rows + k * kPitch + row + i * kFragment, kPitch);
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j)
      wmma::load_matrix_sync(right[j], columns + k * kPitch + column + j * kFragment, kPitch);
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) wmma::mma_sync(sums[i][j], left[i], right[j], sums[i][j]);
  }
}

__global__ void __launch_bounds__(kThreads)
    product_bf16_kernel(Rows<const uint16_t> a, Rows<const uint16_t> b, Sum sum) {
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_column = int64_t{blockIdx.y} * kTile;
  if (is_below(sum, first_row, first_column, kTile)) return;
  alignas(32) __shared__ __nv_bfloat16 rows[2][kTileWords];
  alignas(32) __shared__ __nv_bfloat16 columns[2][kTileWords];
  alignas(32) __shared__ float stage[kThreads / kLanes][kFragment * kStagePitch];
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const int row = warp / (kTile / kWarpColumns) * kWarpRows,
            column = warp % (kTile / kWarpColumns) * kWarpColumns;

  SumFragment pass[kRowFragments][kColumnFragments], total[kRowFragments][kColumnFragments];
#pragma unroll
  for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j) {
      wmma::fill_fragment(pass[i][j], 0.0F);
      wmma::fill_fragment(total[i][j], 0.0F);
    }

  const int64_t n_steps = a.n_tokens / kTokenStep;
  uint4 next_rows[kVectors], next_columns[kVectors];
  for (int64_t step = 0; step <= n_steps; ++step) {
    // The next step is on its way while this one is multiplied.
    if (step < n_steps) {
      fetch(a, step * kTokenStep, first_row, next_rows);
      fetch(b, step * kTokenStep, sum.first_column + first_column, next_columns);
    }
    if (step > 0) {
      multiply(rows[(step - 1) % 2], columns[(step - 1) % 2], row, column, pass);
      if (step % kStepsPerPass == 0 || step == n_steps) {
#pragma unroll
        for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
          for (int j = 0; j < kColumnFragments; ++j) {
#pragma unroll
            for (int e = 0; e < pass[i][j].num_elements; ++e) total[i][j].x[e] += pass[i][j].x[e];
            wmma::fill_fragment(pass[i][j], 0.0F);
          }
      }
    }
    if (step < n_steps) {
      keep(next_rows, rows[step % 2]);
      keep(next_columns, columns[step % 2]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
    for (int j = 0; j < kColumnFragments; ++j) {
      wmma::store_matrix_sync(stage[warp], total[i][j], kStagePitch, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < kFragment * kFragment; e += kLanes) {
        const int64_t r = first_row + row + i * kFragment + e / kFragment,
                      c = first_column + column + j * kFragment + e % kFragment;
        if (r < sum.n_rows && c < sum.n_columns)
          sum.data[r * sum.stride + c] += stage[warp][e / kFragment * kStagePitch + e % kFragment];
      }
      __syncwarp();
    }
}

// f32: a block makes a tile of 64 × 64, each of its threads 4 × 4 of it.
constexpr int kSmallTile = 64, kDepth = 16, kPart = 4;
constexpr int kFloats = kDepth * kSmallTile / kThreads;  // of each side, a thread and step
constexpr int kSmallStepsPerPass = 128 / kDepth;

__device__ void fetch(const Rows<const float>& from, int64_t token, int64_t first, float* values) {
  for (int v = 0; v < kFloats; ++v) {
    const int at = static_cast<int>(threadIdx.x) + v * kThreads;
    const int64_t n = token + at / kSmallTile, channel = first + at % kSmallTile;
    const bool is_inside = n < from.n_tokens && channel < from.n_channels;
    values[v] = is_inside ? from.data[n * from.stride + channel] : 0.0F;
  }
}

__global__ void __launch_bounds__(kThreads)
    product_f32_kernel(Rows<const float> a, Rows<const float> b, Sum sum) {
  const int64_t first_row = int64_t{blockIdx.x} * kSmallTile, first_column = int64_t{blockIdx.y} * kSmallTile;
  if (is_below(sum, first_row, first_column, kSmallTile)) return;
  alignas(16) __shared__ float rows[2][kDepth * kSmallTile];
  alignas(16) __shared__ float columns[2][kDepth * kSmallTile];
  const int row = static_cast<int>(threadIdx.x) / (kSmallTile / kPart) * kPart,
            column = static_cast<int>(threadIdx.x) % (kSmallTile / kPart) * kPart;
  float pass[kPart][kPart] = {}, total[kPart][kPart] = {};
  float next_rows[kFloats], next_columns[kFloats];
  const int64_t n_steps = (a.n_tokens + kDepth - 1) / kDepth;
  for (int64_t step = 0; step <= n_steps; ++step) {
    if (step < n_steps) {
      fetch(a, step * kDepth, first_row, next_rows);
      fetch(b, step * kDepth, sum.first_column + first_column, next_columns);
    }
    if (step > 0) {
      const float *left = rows[(step - 1) % 2] + row, *right = columns[(step - 1) % 2] + column;
#pragma unroll
      for (int k = 0; k < kDepth; ++k)
#pragma unroll
        for (int i = 0; i < kPart; ++i)
#pragma unroll
          for (int j = 0; j < kPart; ++j)
            pass[i][j] = fmaf(left[k * kSmallTile + i], right[k * kSmallTile + j], pass[i][j]);
      if (step % kSmallStepsPerPass == 0 || step == n_steps) {
#pragma unroll
        for (int i = 0; i < kPart; ++i)
#pragma unroll
          for (int j = 0; j < kPart; ++j) {
            total[i][j] += pass[i][j];
            pass[i][j] = 0.0F;
          }
      }
    }
    if (step < n_steps) {
      for (int v = 0; v < kFloats; ++v) {
        const int at = static_cast<int>(threadIdx.x) + v * kThreads;
        rows[step % 2][at] = next_rows[v];
        columns[step % 2][at] = next_columns[v];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPart; ++i)
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      const int64_t r = first_row + row + i, c = first_column + column + j;
      if (r < sum.n_rows && c < sum.n_columns) sum.data[r * sum.stride + c] += total[i][j];
    }
}

/// Tiles of rows by tiles of columns; those below the diagonal end at once.
dim3 grid_of(const Sum& sum, int64_t tile) {
  return {n_blocks(sum.n_rows, tile), n_blocks(sum.n_columns, tile)};
}

}  // namespace

int weigh_bf16(Rows<const uint16_t> x, const float* roots, Rows<uint16_t> to, int* is_bad, Stream stream) {
  return weigh(x, roots, to, is_bad, stream);
}
int weigh_f32(Rows<const float> x, const float* roots, Rows<float> to, int* is_bad, Stream stream) {
  return weigh(x, roots, to, is_bad, stream);
}

int add_product_bf16(Rows<const uint16_t> a, Rows<const uint16_t> b, Sum sum, Stream stream) {
  const cudaLaunchConfig_t config = launch_of(grid_of(sum, kTile), stream);
  return cudaLaunchKernelEx(&config, product_bf16_kernel, a, b, sum);
}
int add_product_f32(Rows<const float> a, Rows<const float> b, Sum sum, Stream stream) {
  const cudaLaunchConfig_t config = launch_of(grid_of(sum, kSmallTile), stream);
  return cudaLaunchKernelEx(&config, product_f32_kernel, a, b, sum);
}

}  // namespace isobath::kernels::cuda
