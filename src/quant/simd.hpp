#pragma once
#include <cstdint>
#include <cstring>

#include "storage.hpp"

/// Eight lanes as one value: the compiler's vector extension, at the width that AVX2 has. Wider values would
/// be split through memory there (GCC 12), and gain little where AVX-512 is run in halves.
///
/// Loops over a constant number of vectors carry `#pragma GCC unroll`: an array of vectors stays in registers
/// only where every index is a constant early on.
namespace isobath::quant::simd {

// One binary serves machines with and without AVX2 and FMA (x86-64-v3). AVX-512 machines run the same clone:
// it gives them the same bits, and one for AVX-512F alone would have no fused multiply-add on eight lanes.
// Sanitizers cannot instrument the resolver of the clones.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ISOBATH_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define ISOBATH_SIMD_CLONES
#endif
#define ISOBATH_SIMD_INLINE inline __attribute__((always_inline))

inline constexpr int64_t kLanes = 8;
using Floats = float __attribute__((vector_size(32)));
using Words = uint32_t __attribute__((vector_size(32)));
using Integers = int32_t __attribute__((vector_size(32)));

/// 1.5·2²³: adding and subtracting it rounds |x| < 2²² to the nearest integer, ties to even.
inline constexpr float kRoundShift = 12582912.0F;

ISOBATH_SIMD_INLINE void load(Floats& value, const float* from) {
  std::memcpy(&value, from, sizeof(value));
}
ISOBATH_SIMD_INLINE void store(float* to, const Floats& value) {
  std::memcpy(to, &value, sizeof(value));
}

/// value := nearest integer of value clamped to [low, high].
ISOBATH_SIMD_INLINE void round_clamped(Floats& value, const Floats& low, const Floats& high) {
  value = value > low ? value : low;
  value = value < high ? value : high;
  value = (value + kRoundShift) - kRoundShift;
}

/// Whether a comparison holds in any lane.
ISOBATH_SIMD_INLINE bool any_of(const Integers& mask) {
  uint64_t parts[sizeof(mask) / sizeof(uint64_t)];
  std::memcpy(parts, &mask, sizeof(mask));
  return (parts[0] | parts[1] | parts[2] | parts[3]) != 0;
}

/// The format of a dtype as constants: rounding to it takes five instructions, none for f32.
template <at::ScalarType kStorage>
inline constexpr StorageFormat kFormat = storage_format(kStorage);

/// Lane by lane the same bits as round_to_storage.
ISOBATH_SIMD_INLINE void round_stored(Floats& value, const StorageFormat& format) {
  Words bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + format.bias + ((bits >> format.dropped_bits) & format.odd)) & format.mask;
  Floats rounded;
  std::memcpy(&rounded, &bits, sizeof(rounded));
  if (format.subnormal_below > 0) {
    const Floats fixed_step = (value + kHalfSubnormalShift) - kHalfSubnormalShift;
    const Integers is_subnormal = (value < format.subnormal_below) & (value > -format.subnormal_below);
    rounded = is_subnormal ? fixed_step : rounded;
  }
  value = rounded;
}

}  // namespace isobath::quant::simd
