#pragma once
#include <cstdint>
#include <isobath/kernels/stream.hpp>

/// The device's parts of the column loop, without ATen. Pointers are of the device; work is put on the stream
/// and not waited for. All launches return their cudaError_t; 0: none.
///
/// Matrices are held by columns: [columns, n_rows] with the rows contiguous. What a row becomes depends on no
/// other row.
namespace isobath::quant::cuda {

using kernels::Stream;

/// storage.hpp's StorageFormat.
struct Format {
  int dropped_bits;
  uint32_t bias, odd, mask;
  float subnormal_below, smallest, largest;
};

/// GridSpec, and the constants of candidates.hpp.
struct GridRules {
  Format format;
  int bits;
  bool is_symmetric, is_searched;
  float smallest_searched, largest_searched;
  int n_refinements, max_zeros;
  const float* factors;  ///< [n_factors] f32
  int n_factors;
};

/// [groups, n_rows].
struct Grids {
  float* scale;
  int8_t* zero;
};

/// Fits the grids of all rows for n_groups groups, `group_fit.hpp`'s GroupFitter: one warp a row and group,
/// its lanes trying different candidates; of equally good ones the first counts, as there.
///
/// columns  [n_groups · width, n_rows]; importance [n_groups · width], at most 1 in each group.
int fit_groups(const float* columns, int64_t n_rows, int64_t n_groups, int64_t width, const float* importance,
               const GridRules& rules, Grids grids, Stream stream);

/// A block of at most kBlockColumns columns in the order of the loop.
struct Block {
  int64_t n_rows;
  int n_columns;
  float* targets;          ///< what the columns are rounded from; current
  float* errors;           ///< in: the original weights; out: w − ŵ
  const float* feedback;   ///< [k · kBlockColumns + i]: R_ik / R_kk, i < k, both within the block
  const float* curvature;  ///< [n_columns] R_kk², relative
};
inline constexpr int kBlockColumns = 128;

/// Settles columns [begin, end): column_block.hpp's settle_columns. settled [n_columns, n_rows]; shifts
/// alike: w − settled.
int settle_columns(const Block& block, int begin, int end, float* settled, float* shifts, Stream stream);

/// Where a block's rounding goes.
struct Rounded {
  int8_t* codes;         ///< [C, n_rows]: of column order[k] of the matrix
  const int64_t* order;  ///< [n_columns]
  int64_t width;         ///< columns of a group
  double* squares;       ///< [n_rows] += Σ curvature (target − ŵ)²
  double* norms;         ///< [n_rows] += Σ (w − ŵ)²
};

/// Rounds columns [begin, end) one after the other on their groups' grids and moves the errors to those
/// behind them in the block: column_block.hpp's solve_columns and feed_forward.
int solve_columns(const Block& block, int begin, int end, const GridRules& rules, Grids grids,
                  const Rounded& rounded, Stream stream);

}  // namespace isobath::quant::cuda
