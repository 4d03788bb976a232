#pragma once
#include <cstdint>

#include "storage.hpp"
#include "tile_grids.hpp"

/// What the refinement does with the rows of a strip in vector lanes; arrays are [·, kRowTile].
namespace isobath::quant {

/// Moves one column of a tile to its best codes and the change on to the gradients of the `n_later` columns
/// that follow it in the block. gradients [1 + n_later, kRowTile]; h_row [1 + n_later] starts at the
/// diagonal; values, steps, changes [kRowTile]. Whether any code changed.
bool refine_column(float* gradients, int64_t n_later, const float* h_row, const TileGrids& grids,
                   StorageFormat format, float* values, float* steps, float* changes);

/// out[r] = Σ_j a[j, r]·b[j, r] over n rows of kRowTile.
void dot_of_rows(const float* a, const float* b, int64_t n, float* out);

/// values[j, r] = steps[j, r]·scale[r] as a loader sees it.
void stored_values(const float* steps, const float* scale, int64_t n, StorageFormat format, float* values);

}  // namespace isobath::quant
