#pragma once
#include <array>
#include <cstdint>

#include "simd.hpp"
#include "tile_grids.hpp"

namespace isobath::quant {

/// Columns between two updates by a matrix product.
inline constexpr int64_t kBlock = 128;

/// A block of columns for kRowTile rows, a column contiguous and all rows advancing together in vector lanes.
/// Small enough for the first- and second-level cache.
struct ColumnBlock {
  static constexpr int64_t kSize = kBlock * kRowTile;
  alignas(64) std::array<float, kSize> targets;  ///< what the columns are rounded from; current
  alignas(64) std::array<float, kSize> errors;   ///< in: the original weights; out: w − ŵ
  alignas(64) std::array<float, kSize> settled;  ///< see settle_columns
  alignas(64) std::array<float, kSize> shifts;   ///< w − settled
  alignas(64) std::array<int8_t, kSize> codes;
  alignas(64) std::array<float, simd::kLanes> squares;  ///< Σ curvature (target − ŵ)², added up by lanes
};

/// What all rows share of a block of n columns.
struct BlockFeedback {
  std::array<float, kBlock * kBlock> rows;  ///< [k · kBlock + i]: R_ik / R_kk, i < k, both within the block
  std::array<float, kBlock> curvature;      ///< R_kk², relative
};

/// Rounds columns [begin, end) one after the other on grids[k], each moving its error to those behind it in
/// [begin, end).
void solve_columns(ColumnBlock& block, int64_t begin, int64_t end, const BlockFeedback& feedback,
                   const TileGrids* const* grids, const StorageFormat& format);

/// Settles columns [begin, end): the values that make up best for the errors of the columns before them,
/// which a grid is to be fitted to. They are what the loop gives when it rounds nothing: each takes its
/// target and feeds on w − settled.
void settle_columns(ColumnBlock& block, int64_t begin, int64_t end, const BlockFeedback& feedback);

/// Moves the errors of columns [begin, end) to the targets of [end, n).
void feed_forward(ColumnBlock& block, int64_t begin, int64_t end, int64_t n, const BlockFeedback& feedback);

}  // namespace isobath::quant
