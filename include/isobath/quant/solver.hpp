#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>

namespace isobath::quant {

/// Rows solved together; fixed, so that a row's bits never depend on how rows are dealt to ranks.
inline constexpr int64_t kRowTile = 64;

/// Round-to-nearest on grids fitted per group. w [R, C] f32 CPU; importance [C] f32 or undefined.
[[nodiscard]] QuantizedMatrix round_to_nearest(const at::Tensor& w, const at::Tensor& importance,
                                               const GridSpec& spec);

/// GPTQ column loop for a tile of rows, lazily in blocks of 128. Groups without act-order are fitted on
/// current columns when the loop reaches them; with act-order all grids are fitted first, on original
/// columns.
///
/// w [R, C] f32 CPU (any R; tiles of kRowTile give the same rows as one call on all rows).
/// Grids are fitted with the weights h_j = 1/U_jj² (the curvature left after compensation), not
/// factor.importance. Differs  from the paper in that clip search and those weights; GridSpec::clip_search =
/// false is the paper's grid. Throws   NumericError naming the first non-finite weight. Source   Frantar et
/// al., GPTQ (ICLR 2023), Algorithm 1; METHOD §3.
[[nodiscard]] QuantizedMatrix gptq(const at::Tensor& w, const Factor& factor, const GridSpec& spec);

/// ½ tr((Ŵ−W) H (Ŵ−W)ᵀ), products in f32, their sum in f64. w, w_hat [R, C]; h [C, C].
[[nodiscard]] double objective(const at::Tensor& w, const at::Tensor& w_hat, const at::Tensor& h);

}  // namespace isobath::quant
