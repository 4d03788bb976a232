#pragma once
#include "columns.hpp"

/// The device's parts of the refinement, without ATen, as columns.hpp: [columns, n_rows].
namespace isobath::quant::cuda {

/// Columns side by side in the order of the factor.
struct RefinedColumns {
  int64_t n_rows;
  int n_columns;
  float* values;           ///< as a loader sees them
  float* steps;            ///< codes from the zero point
  const float* gradients;  ///< of these columns
  float* changes;          ///< out: values − values before
  /// [i · stride + j]: (H + λI)/mean of these columns, 0 where one is dead; symmetric, bit by bit.
  const float* curvature;
  int64_t stride;
};

/// Moves every code of at most kBlockColumns columns, one column after the other: refine_column.hpp's
/// refine_column.
///
/// order [n_columns], width: as Rounded's; grids: of all groups.
int refine_codes(const RefinedColumns& columns, const int64_t* order, int64_t width, const GridRules& rules,
                 Grids grids, Stream stream);

/// Moves the grid of one group, whose columns these are, to the least-squares scale for its codes, of
/// asymmetric grids also with the zero points next to theirs, where the objective falls.
///
/// is_live [n_columns] 1, or 0 in dead columns; grids: of this group.
int refine_grid(const RefinedColumns& group, const float* is_live, const GridRules& rules, Grids grids,
                Stream stream);

}  // namespace isobath::quant::cuda
