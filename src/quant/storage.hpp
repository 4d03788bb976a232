#pragma once
#include <c10/core/ScalarType.h>

#include <bit>
#include <cstdint>
#include <isobath/core/error.hpp>

namespace isobath::quant {

/// Rounding of an f32 value to a shorter float, to nearest even, as integer arithmetic that a compiler
/// vectorizes.
struct StorageFormat {
  int dropped_bits;       ///< significand bits that f32 has more
  uint32_t bias;          ///< just below half of the last kept bit
  uint32_t odd;           ///< 1 where ties go to even, 0 where nothing is dropped
  uint32_t mask;          ///< kept bits
  float subnormal_below;  ///< magnitudes below are rounded to a fixed step (f16), 0: none
  float smallest;  ///< smallest scale we store; bf16 and f32 subnormals are flushed to 0 by many kernels
  float largest;   ///< largest finite value
};

constexpr StorageFormat storage_format(at::ScalarType dtype) {
  switch (dtype) {
    case at::ScalarType::BFloat16:
      return {16, 0x7fffU, 1U, 0xffff0000U, 0.0F, 0x1p-126F, 0x1.fep127F};
    case at::ScalarType::Half:
      return {13, 0x0fffU, 1U, 0xffffe000U, 0x1p-14F, 0x1p-24F, 65504.0F};
    case at::ScalarType::Float:
      return {0, 0U, 0U, 0xffffffffU, 0.0F, 0x1p-126F, 0x1.fffffep127F};
    default:
      fail<ConfigError>(
          "scales are stored as bfloat16, float16 or float32, not {}; set the output dtype to one of these",
          c10::toString(dtype));
  }
}

/// 0.75 has an ulp of 2⁻²⁴, the step of f16 subnormals: adding and subtracting it rounds to that step.
inline constexpr float kHalfSubnormalShift = 0.75F;

inline float round_to_storage(const StorageFormat& format, float value) {
  const float magnitude = value < 0 ? -value : value;
  if (magnitude < format.subnormal_below) return (value + kHalfSubnormalShift) - kHalfSubnormalShift;
  const auto bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + format.bias + ((bits >> format.dropped_bits) & format.odd)) &
                              format.mask);
}

}  // namespace isobath::quant
