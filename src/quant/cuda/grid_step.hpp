#pragma once
#include "columns.hpp"

/// One weight on one grid, for device code. The same operations as simd.hpp's, in the same order.
namespace isobath::quant::cuda {

/// A grid, its codes counted from the zero point.
struct Levels {
  float scale, inverse, low, high;
};

__device__ inline int smallest_code(const GridRules& rules) {
  return -(1 << (rules.bits - 1));
}
__device__ inline int largest_code(const GridRules& rules) {
  return (1 << (rules.bits - 1)) - 1;
}

__device__ inline Levels levels_of(const GridRules& rules, float scale, int zero) {
  return {scale, 1.0F / scale, static_cast<float>(smallest_code(rules) - zero),
          static_cast<float>(largest_code(rules) - zero)};
}

constexpr float kRoundShift = 12582912.0F;  // 1.5·2²³

/// The nearest step of the grid, ties to even.
__device__ inline float nearest_step(const Levels& levels, float value) {
  float step = value * levels.inverse;
  step = step > levels.low ? step : levels.low;
  step = step < levels.high ? step : levels.high;
  return (step + kRoundShift) - kRoundShift;
}

/// The value as a checkpoint holds it.
__device__ inline float round_stored(const Format& format, float value) {
  constexpr float kHalfSubnormalShift = 0.75F;  // its ulp is the step of f16 subnormals
  if (fabsf(value) < format.subnormal_below) return (value + kHalfSubnormalShift) - kHalfSubnormalShift;
  const uint32_t bits = __float_as_uint(value);
  return __uint_as_float((bits + format.bias + ((bits >> format.dropped_bits) & format.odd)) & format.mask);
}

__device__ inline float larger(float a, float b) {
  return a < b ? b : a;
}
__device__ inline float smaller(float a, float b) {
  return b < a ? b : a;
}

/// As group_fit.hpp's storable_scale.
__device__ inline float storable_scale(const GridRules& rules, float scale) {
  const float largest =
      round_stored(rules.format, rules.format.largest / static_cast<float>(1 << (rules.bits + 1)));
  const float stored = round_stored(rules.format, smaller(scale, largest));
  return smaller(larger(stored, rules.format.smallest), largest);
}

}  // namespace isobath::quant::cuda
