#pragma once
#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>

/// Slow, obvious, one thread, f64: the specification the fast paths are tested against.
namespace isobath::quant::reference {

/// Literal Algorithm 1 of the GPTQ paper: H⁻¹ by inversion, its upper Cholesky factor, one column at a time
/// over all later columns.
[[nodiscard]] QuantizedMatrix gptq(const at::Tensor& w, const at::Tensor& h, const FactorSpec& factor,
                                   const GridSpec& spec);
/// Coordinate descent one row and slab at a time: every code against all others by the whole objective, then
/// the grid of every group within the slab.
[[nodiscard]] QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target,
                                     const at::Tensor& h, int64_t sweeps, const std::vector<Range>& slabs);
/// argmin_V ‖D^½ (R + X̃Wᵀ − XVᵀ)‖² + ridge·‖V − W‖² from the inputs [n, C], token weights [n] and what the
/// residual stream lacks [n, R], or undefined: 0; f64 [R, C].
[[nodiscard]] at::Tensor least_squares_target(const at::Tensor& w, const at::Tensor& x_original,
                                              const at::Tensor& x, const at::Tensor& token_weights,
                                              double ridge, const at::Tensor& residual = {});
/// W plus, for each column i, what the columns behind it need to make up for w_i (x̃_i − x_i):
/// w_i C_{i,>i} (H_{>i,>i})⁻¹. Literal, one inverse a column, f64 [R, C].
[[nodiscard]] at::Tensor gptaq_target(const at::Tensor& w, const at::Tensor& c, const at::Tensor& h);
[[nodiscard]] GroupGrid fit_grid(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec);

}  // namespace isobath::quant::reference
