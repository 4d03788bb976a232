#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/kernels/stream.hpp>

/// What the device code of this module and of those above it shares. In a build without CUDA all but
/// `has_device_kernels` throw InternalError.
namespace isobath::kernels {

/// Whether this build has kernels for CUDA tensors.
[[nodiscard]] bool has_device_kernels();

/// The stream that ATen's operations on this device go to at present.
[[nodiscard]] Stream current_stream(c10::Device device);

/// Throws InternalError naming `what` when a launch returned a cudaError_t other than 0.
void check_launch(int code, const char* what);

/// sum[i, j] += Σ_n a_ni b_nj in f32, each element in the order of n with fused multiply-adds: its bits do
/// not depend on the other rows and columns, which a library's product does not promise.
///
/// sum      [p, q]; a [n, p]; b [n, q]: f32, one CUDA device, rows contiguous. Does not wait for the device.
///
/// Cost     n·p·q multiply-adds.
void add_device_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

}  // namespace isobath::kernels
