#pragma once
#include <ATen/ATen.h>

#include <isobath/io/safetensors_reader.hpp>
#include <string>

namespace isobath::sensitivity::testing {

/// One module of tests/data/sensitivity_golden.safetensors; see make_sensitivity_golden.py.
class GoldenModule {
 public:
  explicit GoldenModule(std::string name)
      : file_(std::string(ISOBATH_TEST_DATA) + "/sensitivity_golden.safetensors"), name_(std::move(name)) {}
  [[nodiscard]] at::Tensor operator[](const std::string& what) const {
    return file_.read(name_ + "." + what);
  }
  /// [n, T] bool, true: a real token.
  [[nodiscard]] at::Tensor mask() const {
    const at::Tensor lengths = file_.read("lengths");
    return at::arange((*this)["x"].size(1)).unsqueeze(0) < lengths.unsqueeze(1);
  }

 private:
  io::SafetensorsReader file_;
  std::string name_;
};

inline constexpr const char* kGoldenModules[] = {"k", "o", "down"};

/// X and G are stored in f32 and the statistics summed in f32 within a sequence; the oracle is f64
/// throughout.
inline constexpr double kGoldenTolerance = 1e-4;

}  // namespace isobath::sensitivity::testing
