#pragma once
#include <array>
#include <cstdint>
#include <isobath/quant/grid.hpp>
#include <isobath/quant/solver.hpp>

#include "candidates.hpp"
#include "group_fit.hpp"

namespace isobath::quant {

/// The grids of one group for the rows of a tile, one array entry per row; codes are counted from the zero
/// point.
struct TileGrids {
  std::array<float, kRowTile> scale, inverse, low, high;
  std::array<int8_t, kRowTile> zero;

  void set(int64_t row, RowGrid grid, const GridSpec& spec) {
    scale[row] = grid.scale;
    inverse[row] = 1.0F / grid.scale;
    low[row] = static_cast<float>(smallest_code(spec) - grid.zero);
    high[row] = static_cast<float>(largest_code(spec) - grid.zero);
    zero[row] = static_cast<int8_t>(grid.zero);
  }
};

}  // namespace isobath::quant
