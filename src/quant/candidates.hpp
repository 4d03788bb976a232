#pragma once
#include <algorithm>
#include <cmath>
#include <isobath/quant/grid.hpp>
#include <vector>

/// Which grids the clip search tries; shared by the fast and the reference fit.
namespace isobath::quant {

inline int smallest_code(const GridSpec& spec) {
  return -(1 << (spec.bits - 1));
}
inline int largest_code(const GridSpec& spec) {
  return (1 << (spec.bits - 1)) - 1;
}

/// Groups outside get their min–max grid: squared errors would leave the range of f32.
inline constexpr float kSmallestSearched = 1e-15F;
inline constexpr float kLargestSearched = 1e15F;

/// Rounds of "codes for this scale, then the least-squares scale for these codes".
inline constexpr int kRefinements = 6;

/// Shrink factors of the no-clipping scale, geometric. The fewer levels, the further the best range lies
/// inside the data. Up to 4 bits the refinement that follows makes up for a coarse search; at 8 it does not
/// (docs/decisions/0011-clip-search.md).
inline std::vector<float> shrink_factors(const GridSpec& spec) {
  const double octaves = spec.bits == 2 ? 2.5 : spec.bits == 3 ? 2.0 : spec.bits == 4 ? 1.25 : 1.0;
  const int per_octave = spec.bits > 4 ? (spec.symmetric ? 64 : 32) : (spec.symmetric ? 8 * spec.bits : 16);
  std::vector<float> factors;
  for (int k = spec.symmetric ? 0 : -2; k <= octaves * per_octave; ++k) {
    factors.push_back(static_cast<float>(std::exp2(-static_cast<double>(k) / per_octave)));
  }
  return factors;
}

/// Zero points between "window starts at the smallest weight" and "window ends at the largest", at most
/// kMaxZeros of them.
struct ZeroRange {
  int first, last, step;
};
inline constexpr int kMaxZeros = 9;
inline ZeroRange zero_candidates(const GridSpec& spec, double min, double max, double scale) {
  const double lowest = smallest_code(spec), highest = largest_code(spec);
  const auto code = [&](double value) {
    return static_cast<int>(std::nearbyint(std::clamp(value, lowest, highest)));
  };
  const int a = code(highest - max / scale), b = code(lowest - min / scale);
  const int first = std::min(a, b), last = std::max(a, b);
  return {first, last, std::max(1, (last - first + kMaxZeros - 2) / (kMaxZeros - 1))};
}

}  // namespace isobath::quant
