#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/quant/factor.hpp>
#include <vector>

namespace isobath::quant {

/// Columns that a sweep of the refinement visits together, in the factor's column order: runs of panels that
/// end where a group ends, so that a group's grid can move. A group wider than kWidestSlab keeps its grid.
[[nodiscard]] std::vector<Range> refinement_slabs(const std::vector<Range>& panels, int64_t group_width);

inline constexpr int64_t kWidestSlab = 8 * kPanel;

/// The rows of a slab of R diag(R)⁻¹ from column `columns.begin` on, [width, C − begin] f32, put together
/// from part(p, rows), rows [rows] of panel p, [rows.size(), width of p], where that is.
[[nodiscard]] at::Tensor slab_rows(const std::vector<Range>& panels, Range columns,
                                   const std::function<at::Tensor(size_t panel, Range rows)>& part);

/// Rows [begin, end) of R from column `begin` on: all that (H + λI) has to do with these columns, seen from
/// ΔW R. Divided by √mean(diag H), so that the size of H does not matter.
struct Slab {
  Range columns;         ///< in the factor's column order
  at::Tensor rows;       ///< [width, C − begin] f32
  at::Tensor curvature;  ///< [width, width] f32: (H + λI)/mean of these columns, 0 where one is dead

  /// unit: from slab_rows, scaled in place, on the host or where the rows are refined. Cost  width² C
  /// multiply-adds, unless it is only for loading.
  Slab(Range columns, at::Tensor unit, const Factor& factor, bool is_for_sweep);
};

/// The ranges of the panels of a factor, and a slab of it; all panels must be here.
[[nodiscard]] std::vector<Range> panels_of(const Factor& factor);
[[nodiscard]] Slab slab_of(const Factor& factor, Range columns, bool is_for_sweep);

}  // namespace isobath::quant
