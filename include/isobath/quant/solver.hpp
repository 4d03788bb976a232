#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>
#include <isobath/quant/row_solver.hpp>

namespace isobath::quant {

/// Round-to-nearest on grids fitted per group. w [R, C] f32 CPU; importance [C] f32 or undefined.
[[nodiscard]] QuantizedMatrix round_to_nearest(const at::Tensor& w, const at::Tensor& importance,
                                               const GridSpec& spec);

/// RowSolver over a factor whose panels are all here. w [R, C] f32 CPU (any R; tiles of kRowTile give the
/// same rows as one call on all rows).
[[nodiscard]] QuantizedMatrix gptq(const at::Tensor& w, const Factor& factor, const GridSpec& spec);

/// ½ tr((Ŵ−W) H (Ŵ−W)ᵀ), products in f32, their sum in f64. w, w_hat [R, C]; h [C, C].
[[nodiscard]] double objective(const at::Tensor& w, const at::Tensor& w_hat, const at::Tensor& h);

/// Throws NumericError naming the first entry of w [R, C] f32 that is not finite; rows count from first_row.
void check_weights(const at::Tensor& w, int64_t first_row = 0);

}  // namespace isobath::quant
