#pragma once
#include <array>
#include <cstdint>
#include <isobath/core/partition.hpp>

#include "column_loop.hpp"
#include "simd.hpp"
#include "tile_grids.hpp"

namespace isobath::quant {

/// Columns whose errors are summed up one column at a time; those of more columns go through register tiles.
inline constexpr int64_t kStep = 32;

/// A block of columns for kRowTile rows, a column contiguous and all rows advancing together in vector lanes.
/// Small enough for the first- and second-level cache.
struct ColumnBlock {
  static constexpr int64_t kSize = kBlock * kRowTile;
  alignas(
      64) std::array<float, kSize> targets;  ///< in: what the columns are rounded from; out: see take_codes
  alignas(64) std::array<float, kSize> errors;          ///< in: the original weights; out: w − ŵ
  alignas(64) std::array<float, kSize> settled;         ///< see settle_columns
  alignas(64) std::array<float, kSize> shifts;          ///< w − settled
  alignas(64) std::array<float, simd::kLanes> squares;  ///< Σ curvature (target − ŵ)², added up by lanes
};

/// What all rows share of a block of n columns.
struct BlockFeedback {
  alignas(
      64) std::array<float, kBlock * kBlock> rows;  ///< [k · kBlock + i]: R_ik / R_kk, i < k, in the block
  std::array<float, kBlock> curvature;              ///< R_kk², relative
};

/// Moves the errors of columns `from` to the targets of `to`, which lie behind them.
void feed_forward(ColumnBlock& block, Range from, Range to, const BlockFeedback& feedback);

/// Settles columns: the values that make up best for the errors of the columns before them, which a grid is
/// to be fitted to. They are what the loop gives when it rounds nothing: each takes its target and feeds on
/// w − settled. The errors of the columns before must be in the targets.
void settle_columns(ColumnBlock& block, Range columns, const BlockFeedback& feedback);

/// Rounds columns one after the other on grids[k], each from its target and the errors of the columns before
/// it in the range; those of earlier ones must be in the targets. Leaves codes in the place of the targets.
void solve_columns(ColumnBlock& block, Range columns, const BlockFeedback& feedback,
                   const TileGrids* const* grids, const GridSpec& spec);

/// The codes of n solved columns, in their order, for the first n_rows rows: codes[row · stride + k].
void take_codes(const ColumnBlock& block, int64_t n, int64_t n_rows, int8_t* codes, int64_t stride);

}  // namespace isobath::quant
