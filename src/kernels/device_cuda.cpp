#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/device.hpp>

namespace isobath::kernels {

bool has_device_kernels() {
  return true;
}

Stream current_stream(c10::Device device) {
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
}

void check_launch(int code, const char* what) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  fail<InternalError>(
      "launching {} on the device failed: {} ({}); rebuild for this device's architecture, or "
      "run with ranks.device: cpu",
      what, cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace isobath::kernels
