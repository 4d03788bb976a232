#include <isobath/core/error.hpp>
#include <isobath/kernels/device.hpp>

#include "cuda/gram.hpp"

namespace isobath::kernels {

[[noreturn]] static void no_device() {
  fail<InternalError>("a CUDA tensor in a build without CUDA (ISOBATH_WITH_CUDA=OFF)");
}

bool has_device_kernels() {
  return false;
}
Stream current_stream(c10::Device) {
  no_device();
}
void check_launch(int, const char*) {
  no_device();
}
int cuda::weigh_bf16(Rows<const uint16_t>, const float*, Rows<uint16_t>, int*, Stream) {
  no_device();
}
int cuda::weigh_f32(Rows<const float>, const float*, Rows<float>, int*, Stream) {
  no_device();
}
int cuda::add_product_bf16(Rows<const uint16_t>, Rows<const uint16_t>, Sum, Stream) {
  no_device();
}
int cuda::add_product_f32(Rows<const float>, Rows<const float>, Sum, Stream) {
  no_device();
}

}  // namespace isobath::kernels
