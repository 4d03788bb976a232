#pragma once
#include <cstdint>
#include <isobath/core/partition.hpp>
#include <vector>

namespace isobath::pipeline {

/// Row tiles of one module, and what one of them costs, in any one unit.
struct TileWork {
  int64_t n_tiles = 0;
  int64_t every = 1;   ///< of the tiles, those with index 0, every, … are rounded to nearest, too
  double solve = 0;    ///< its codes
  double round = 0;    ///< rounding it, which needs no factor
  double product = 0;  ///< of the rounding's error with the factor
};

/// One rank's share of a module.
struct TileShare {
  Range solved;                ///< tiles
  std::vector<int64_t> early;  ///< tiles rounded before the factor is there
  std::vector<int64_t> late;   ///< … and when it is
};

/// Deals the tiles of modules that are solved together. Larger shares of codes go to the ranks that have
/// least of them; then each rounding goes to the rank, and before or behind the moment when all ranks have
/// the factor, where it delays the whole least. Pure: every rank finds the same.
///
/// factorization  what each rank factorizes before that moment, in the unit of the tiles' costs.
/// Returns the shares of `rank`, one a module. Cost: O(tiles · ranks).
[[nodiscard]] std::vector<TileShare> deal_tiles(const std::vector<TileWork>& modules,
                                                const std::vector<double>& factorization, int rank);

}  // namespace isobath::pipeline
