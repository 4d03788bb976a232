#pragma once
#include <cstdint>
#include <isobath/quant/grid.hpp>
#include <span>
#include <vector>

#include "storage.hpp"

namespace isobath::quant {

/// The grid of one row for one group, with what the rounding loops need of it.
struct RowGrid {
  float scale = 1;  ///< positive, exactly representable in the storage dtype
  int zero = 0;
};

/// The nearest scale that a loader reads back as it is and whose largest step does not overflow; positive.
[[nodiscard]] float storable_scale(const GridSpec& spec, const StorageFormat& format, float scale);

/// Fits grids of many rows for one group of columns; holds the scratch memory. Not shared by threads.
class GroupFitter {
 public:
  /// importance: one weight per column, or empty (uniform).
  GroupFitter(const GridSpec& spec, int64_t n_columns, std::span<const float> importance);
  /// weights: n_columns contiguous values.
  [[nodiscard]] RowGrid fit(const float* weights);

 private:
  [[nodiscard]] float storable(float scale) const { return storable_scale(spec_, format_, scale); }
  [[nodiscard]] RowGrid min_max() const;
  void consider(RowGrid candidate);
  void search_symmetric();
  void search_asymmetric();
  void refine();

  GridSpec spec_;
  StorageFormat format_;
  std::vector<float> factors_;
  int64_t n_columns_;
  int64_t n_padded_;
  std::vector<float> importance_;  ///< padded with zeros: padding adds nothing to an error
  std::vector<float> weights_;
  float min_ = 0, max_ = 0;
  RowGrid best_;
  float best_error_ = 0;
};

/// Codes of `n` weights on one grid: the nearest, clamped to the code range.
void encode_row(const GridSpec& spec, const RowGrid& grid, const float* weights, int64_t n, int8_t* codes);

/// Throws ConfigError for bits, group or storage that no checkpoint can hold.
void check_spec(const GridSpec& spec);

}  // namespace isobath::quant
