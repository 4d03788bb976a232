#include <isobath/kernels/device.hpp>

/// What is of the device around the kernels; the tests give CPU tensors to the code that launches them.
namespace isobath::kernels {

bool has_device_kernels() {
  return true;
}
Stream current_stream(c10::Device) {
  return nullptr;
}
void check_launch(int, const char*) {}

}  // namespace isobath::kernels
