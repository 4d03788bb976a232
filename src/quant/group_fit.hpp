#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <isobath/quant/grid.hpp>
#include <span>
#include <vector>

#include "storage.hpp"

namespace isobath::quant {

/// Rows that a fit treats at once: the lanes of simd.hpp.
inline constexpr int64_t kFitLanes = 8;

/// The grid of one row for one group, with what the rounding loops need of it.
struct RowGrid {
  float scale = 1;  ///< positive, exactly representable in the storage dtype
  int zero = 0;
};

/// The largest scale whose largest step does not overflow.
inline float largest_scale(const GridSpec& spec, const StorageFormat& format) {
  return round_to_storage(format, format.largest / static_cast<float>(1 << (spec.bits + 1)));
}

/// The nearest scale that a loader reads back as it is and whose largest step does not overflow; positive.
[[nodiscard]] float storable_scale(const GridSpec& spec, const StorageFormat& format, float scale);

/// Fits grids of many rows for one group of columns, simd::kLanes rows at a time, one a vector lane. Threads
/// may share it.
class GroupFitter {
 public:
  /// importance: one weight per column, or empty (uniform).
  GroupFitter(const GridSpec& spec, int64_t n_columns, std::span<const float> importance);
  /// The value of row r in column j stands at columns[j · stride + r]; grids [kLanes].
  void fit(const float* columns, int64_t stride, RowGrid* grids) const;

 private:
  GridSpec spec_;
  StorageFormat format_;
  std::vector<float> factors_;
  int64_t n_columns_;
  std::vector<float> importance_;
};

/// Fits the rows of w [n_rows, ≥ n_columns] row-major with `stride` between rows: calls take(row, grid) for
/// each.
template <class Take>
void fit_rows(const GroupFitter& fitter, const float* w, int64_t stride, int64_t n_rows, int64_t n_columns,
              std::vector<float>& scratch, const Take& take) {
  scratch.resize(static_cast<size_t>(n_columns * kFitLanes));
  std::array<RowGrid, kFitLanes> grids;
  for (int64_t begin = 0; begin < n_rows; begin += kFitLanes) {
    const int64_t n = std::min(kFitLanes, n_rows - begin);
    for (int64_t lane = 0; lane < kFitLanes; ++lane)
      for (int64_t j = 0; j < n_columns; ++j)
        scratch[static_cast<size_t>(j * kFitLanes + lane)] = lane < n ? w[(begin + lane) * stride + j] : 0.0F;
    fitter.fit(scratch.data(), kFitLanes, grids.data());
    for (int64_t lane = 0; lane < n; ++lane) take(begin + lane, grids[static_cast<size_t>(lane)]);
  }
}

/// Codes of `n` weights on one grid: the nearest, clamped to the code range.
void encode_row(const GridSpec& spec, const RowGrid& grid, const float* weights, int64_t n, int8_t* codes);

/// Throws ConfigError for bits, group or storage that no checkpoint can hold.
void check_spec(const GridSpec& spec);

}  // namespace isobath::quant
