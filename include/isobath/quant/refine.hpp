#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/grid.hpp>

namespace isobath::quant {

/// The H that refine works with: (H + λ·mean(diag H)·I) / mean(diag H) over the live columns, f32. Rows and
/// columns with H_jj = 0 (dead) are zero. Damped by the λ of the column loop's factor, so that both minimise
/// the same objective: the undamped one is free to move weights along directions that few calibration tokens
/// determine. h [C, C] f32 symmetric -> [C, C] f32.
[[nodiscard]] at::Tensor damped_hessian(const at::Tensor& h, double damping);

/// Lowers ½ tr((Ŵ−T) H (Ŵ−T)ᵀ) from a quantized start by coordinate descent. A sweep visits every code (the
/// nearest to ŵ_j − g_j/H_jj, g = (Ŵ−T)H: the minimum over that code), then every group's grid (least-squares
/// scale for its codes; asymmetric grids also try the zero points next to theirs). A move is taken only if
/// the objective of the stored values, as a loader sees them, falls: it never rises beyond f32 rounding.
///
///   start    codes and grids of T, from gptq or round_to_nearest
///   target   T [R, C] f32 CPU: the weights, or the corrected ones of correction.hpp
///   h        [C, C] f32, from damped_hessian; columns with H_jj = 0 keep the value 0
///   sweeps   at most so many; a tile stops before when a sweep changes nothing
///
/// Tiles of kRowTile rows give the same rows as one call on all rows. Deterministic, local.
/// Cost     R·C² multiply-adds to start and R·C² a sweep.
/// Source   coordinate descent on codes: Behdin et al., QuantEase (2023); METHOD §3.
[[nodiscard]] QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target,
                                     const at::Tensor& h, int64_t sweeps);

}  // namespace isobath::quant
