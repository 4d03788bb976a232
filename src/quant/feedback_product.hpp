#pragma once
#include <cstdint>
#include <isobath/core/partition.hpp>
#include <memory>

#include "simd.hpp"

namespace isobath::quant {

/// Columns of R diag(R)⁻¹, packed for the register tiles of a product with the errors of row tiles: shared by
/// all tiles and threads.
class FeedbackColumns {
 public:
  /// Columns of a register tile.
  static constexpr int64_t kSliver = 6;

  FeedbackColumns(int64_t n_sources, int64_t n_columns);
  /// Takes some columns of the product for some of the sources: what source i feeds to column k stands at
  /// from[i · stride + k − columns.begin]. Different parts may be packed at once.
  void pack(const float* from, int64_t stride, Range sources, Range columns);

  /// targets[k · n_rows + r] += Σ_i columns[i, k] · errors[i · n_rows + r], over i in their order, in parts
  /// of 256 that are summed on their own. n_rows: a multiple of 16.
  void add_product(const float* errors, int64_t n_rows, float* targets) const;

 private:
  int64_t n_sources_, n_columns_;
  std::unique_ptr<float[]> values_;  ///< [slivers, n_sources, kSliver]; what is behind the last column is 0
};

}  // namespace isobath::quant
