#pragma once
#include <cstdint>

#define ISOBATH_INLINE inline __attribute__((always_inline))

namespace isobath::kernels {

/// A vector of f32 numbers in registers, loaded from and stored to rows of Value. Specialized where the
/// target is chosen (avx2/tile.hpp for float, avx512/tile.hpp for the bits of bf16), so that steps over rows
/// are written once; arithmetic is that of the compiler's vector types.
template <class Value>
struct Lanes;

/// Says that all lanes of a vector are meant, where a number of lanes may stand too.
struct AllLanes {};

/// body(j, lanes) for every vector of a row of n values, j its first one; lanes is AllLanes but at the end.
template <class V, class Body>
ISOBATH_INLINE void for_lanes(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + V::kCount <= n; j += V::kCount) body(j, AllLanes{});
  if (j < n) body(j, n - j);
}

/// value in the first n lanes, `other` in the rest.
template <class V>
ISOBATH_INLINE typename V::Vector keep(AllLanes, typename V::Vector value, typename V::Vector) {
  return value;
}
template <class V>
ISOBATH_INLINE typename V::Vector keep(int64_t n, typename V::Vector value, typename V::Vector other) {
  return V::select(V::first(n), value, other);
}

}  // namespace isobath::kernels
