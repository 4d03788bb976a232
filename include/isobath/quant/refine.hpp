#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>
#include <isobath/quant/row_solver.hpp>
#include <vector>

namespace isobath::quant {

/// Columns that a sweep of the refinement visits together, in the factor's column order: runs of panels that
/// end where a group ends, so that a group's grid can move. A group wider than kWidestSlab keeps its grid.
[[nodiscard]] std::vector<Range> refinement_slabs(const std::vector<Range>& panels, int64_t group_width);

inline constexpr int64_t kWidestSlab = 8 * kPanel;

/// The rows of a slab of R diag(R)⁻¹ from column `columns.begin` on, [width, C − begin] f32, put together
/// from part(p, rows), rows [rows] of panel p, [rows.size(), width of p].
[[nodiscard]] at::Tensor slab_rows(const std::vector<Range>& panels, Range columns,
                                   const std::function<at::Tensor(size_t panel, Range rows)>& part);

/// Rows [begin, end) of R from column `begin` on: all that (H + λI) has to do with these columns, seen from
/// ΔW R. Divided by √mean(diag H), so that the size of H does not matter.
struct Slab {
  Range columns;         ///< in the factor's column order
  at::Tensor rows;       ///< [width, C − begin] f32
  at::Tensor curvature;  ///< [width, width] f32: (H + λI)/mean of these columns, 0 where one is dead

  /// unit: from slab_rows, scaled in place. Cost  width² C multiply-adds, unless it is only for loading.
  Slab(Range columns, at::Tensor unit, const Factor& factor, bool is_for_sweep);
};

/// Lowers ½ tr((Ŵ−T) (H + λI) (Ŵ−T)ᵀ) from a quantized start by coordinate descent, λ that of the factor: the
/// undamped objective is free to move weights along directions that few calibration tokens determine. With
/// H + λI = R Rᵀ and E = (Ŵ−T)R the objective is ½‖E‖², its gradient at columns b is E Rᵀ[:, b], and a move
/// of those columns adds to E what the rows b of R say: H need not stand anywhere, and R is needed slab by
/// slab.
///
/// A sweep visits every slab: each of its codes (the nearest to ŵ_j − g_j/H_jj, the minimum over that code),
/// then the grid of each group that lies within it (least-squares scale for its codes; asymmetric grids also
/// try the zero points next to theirs). A move is taken only if the objective of the stored values, as a
/// loader sees them, falls: it never rises beyond f32 rounding. Act-order scatters groups: grids stay.
///
/// Strips of kRowTile rows give the same rows as one call on all rows. Deterministic, local.
/// Memory   5 C bytes a row for E and codes, and the slab in work.
/// Cost     C²/2 multiply-adds a row to load and C² a sweep.
/// Source   coordinate descent on codes: Behdin et al., QuantEase (2023); METHOD §3.
class Refiner {
 public:
  /// start   codes and grids of T, from gptq or round_to_nearest
  /// target  T [R, C] any float dtype, CPU: the weights, or the corrected ones of correction.hpp
  /// factor  of H; its panels may be missing. Target and factor must outlive this. Dead columns keep value 0.
  Refiner(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor);

  /// Once for each slab, before the first sweep.
  void load(const Slab& slab);
  /// Once for each slab in order, for each sweep. Strips that a sweep left as they were do nothing more.
  void sweep(const Slab& slab);

  /// Σ over the live columns' ½ tr((Ŵ−T) H (Ŵ−T)ᵀ), undamped, of each tile of so many rows: [tiles] f64.
  [[nodiscard]] at::Tensor objectives(int64_t tile_rows) const;
  [[nodiscard]] QuantizedMatrix take();

 private:
  class Work;
  struct Strip {
    at::Tensor errors;  ///< [C, kRowTile] f32: Eᵀ/√mean, in the factor's column order
    bool has_moved = false, is_settled = false;
  };
  template <class Visit>
  void for_each_strip(const Slab& slab, const Visit& visit);
  [[nodiscard]] Range rows_of(int64_t strip) const;

  const at::Tensor& target_;
  const Factor& factor_;
  QuantizedMatrix matrix_;  ///< scales in f32 until they are taken
  std::vector<Strip> strips_;
};

/// A slab, and a Refiner, of a factor whose panels are all here. target [R, C] f32 CPU.
[[nodiscard]] Slab slab_of(const Factor& factor, Range columns, bool is_for_sweep);
[[nodiscard]] QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target,
                                     const Factor& factor, int64_t sweeps);

}  // namespace isobath::quant
