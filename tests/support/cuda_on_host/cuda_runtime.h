#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

/// Stands in for CUDA's header where its kernels' source is compiled for the host by a test: every thread of
/// a block is a fiber, blocks run one after the other. A fiber runs until it waits at a barrier, so that what
/// lacks a barrier gives wrong numbers here, too; timing, memory spaces and alignment are not checked.
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  uint32_t x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

inline constexpr unsigned kWarp = 32;

/// Counts those who arrived, and rounds that are complete.
struct Barrier {
  unsigned n_waiting = 0;
  uint64_t round = 0;
};

class Block {
 public:
  /// Runs `body` once for each thread of the block. One-dimensional blocks of whole warps.
  void run(unsigned n_threads, const std::function<void()>& body) {
    constexpr size_t kStackBytes = size_t{1} << 17;
    while (fibers_.size() < n_threads) fibers_.push_back({{}, std::make_unique<char[]>(kStackBytes), false});
    body_ = &body;
    n_alive_ = n_threads;
    everyone_ = {};
    warps_.assign(n_threads / kWarp, {});
    slots_.assign(n_threads, 0);
    for (unsigned t = 0; t < n_threads; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.is_done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    while (n_alive_ > 0)
      for (unsigned t = 0; t < n_threads; ++t) {
        if (fibers_[t].is_done) continue;
        current_ = t;
        threadIdx = {t, 0, 0};
        swapcontext(&scheduler_, &fibers_[t].context);
      }
  }

  void wait_for_block() { wait(everyone_, n_alive_); }
  void wait_for_warp() { wait(warps_[current_ / kWarp], kWarp); }

  /// The value that a lane of the same warp passes to the same call.
  template <class T>
  T exchange(T value, unsigned lane) {
    static_assert(sizeof(T) == sizeof(uint32_t));
    slots_[current_] = std::bit_cast<uint32_t>(value);
    wait_for_warp();
    const T other = std::bit_cast<T>(slots_[current_ / kWarp * kWarp + lane % kWarp]);
    wait_for_warp();
    return other;
  }
  [[nodiscard]] unsigned lane() const { return current_ % kWarp; }

  static Block& instance() {
    static Block block;
    return block;
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool is_done;
  };

  static void enter() {
    Block& block = instance();
    (*block.body_)();
    block.fibers_[block.current_].is_done = true;
    --block.n_alive_;
  }

  void wait(Barrier& barrier, unsigned n_expected) {
    const uint64_t round = barrier.round;
    if (++barrier.n_waiting == n_expected) {
      barrier.n_waiting = 0;
      ++barrier.round;
      return;
    }
    while (barrier.round == round) {
      const unsigned self = current_;
      swapcontext(&fibers_[self].context, &scheduler_);
    }
  }

  ucontext_t scheduler_{};
  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0, n_alive_ = 0;
  Barrier everyone_;
  std::vector<Barrier> warps_;
  std::vector<uint32_t> slots_;
};

}  // namespace cuda_on_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        cuda_on_host::Block::instance().run(blockDim.x, body);
  return 0;
}

inline void __syncthreads() {
  cuda_on_host::Block::instance().wait_for_block();
}
inline void __syncwarp() {
  cuda_on_host::Block::instance().wait_for_warp();
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  cuda_on_host::Block& block = cuda_on_host::Block::instance();
  return block.exchange(value, block.lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return cuda_on_host::Block::instance().exchange(value, lane);
}
inline int atomicOr(int* at, int value) {
  const int old = *at;
  *at |= value;
  return old;
}
inline uint32_t __float_as_uint(float value) {
  return std::bit_cast<uint32_t>(value);
}
inline float __uint_as_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
