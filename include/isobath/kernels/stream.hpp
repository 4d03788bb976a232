#pragma once

struct CUstream_st;

namespace isobath::kernels {

/// A cudaStream_t, for headers that must do without CUDA's.
using Stream = CUstream_st*;

}  // namespace isobath::kernels
