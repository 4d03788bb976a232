#pragma once
#include <cstdint>
#include <isobath/core/error.hpp>

namespace isobath {

/// Half-open range of indices.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  [[nodiscard]] int64_t size() const { return end - begin; }
  [[nodiscard]] bool contains(int64_t index) const { return begin <= index && index < end; }
  bool operator==(const Range&) const = default;
};

/// Contiguous share `part` of `n_items` dealt over `n_parts`; the first n_items % n_parts shares hold one
/// more.
///
///   n_items = 16, n_parts = 3:  [0, 6) [6, 11) [11, 16)
///   n_items = 2,  n_parts = 4:  [0, 1) [1, 2) [2, 2) [2, 2)
[[nodiscard]] inline Range partition(int64_t n_items, int64_t n_parts, int64_t part) {
  ISOBATH_CHECK(n_items >= 0 && n_parts > 0 && 0 <= part && part < n_parts, "partition({}, {}, {})", n_items,
                n_parts, part);
  const int64_t base = n_items / n_parts, extra = n_items % n_parts;
  const int64_t begin = part * base + (part < extra ? part : extra);
  return {begin, begin + base + (part < extra ? 1 : 0)};
}

/// The share of `partition(n_items, n_parts, ·)` that holds `item`.
[[nodiscard]] inline int64_t owner_of(int64_t item, int64_t n_items, int64_t n_parts) {
  ISOBATH_CHECK(0 <= item && item < n_items, "item {} of {}", item, n_items);
  const int64_t base = n_items / n_parts, extra = n_items % n_parts;
  const int64_t in_larger = extra * (base + 1);
  return item < in_larger ? item / (base + 1) : extra + (item - in_larger) / base;
}

}  // namespace isobath
