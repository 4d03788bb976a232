#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>

/// The asymmetric objective ½ ‖D^½ (X̃Wᵀ − XŴᵀ)‖²: what a linear gave in the original model (input X̃)
/// against what it gives behind the quantized prefix (input X). With H = XᵀDX and C = (X̃−X)ᵀDX it is, up to
/// a constant, ½ tr(ΔW H ΔWᵀ) − tr(W C ΔWᵀ), ΔW = Ŵ − W. Its minimum without quantization is W + W C H⁻¹.
///
/// A correction is the matrix M of the target W + a·W·M that is quantized instead of W.
namespace isobath::quant {

/// M = C (H + λ·mean(diag H)·I)⁻¹, the mean over live columns. λ is raised tenfold until H is positive
/// definite.
/// c, h [C, C] f32 CPU -> [C, C] f32; solved in f64, 7/3 C³ multiply-adds, 3 C² f64.
/// Source   Arai & Ichikawa, QEP (2025): there a = ½, λ = 1.
[[nodiscard]] at::Tensor qep_correction(const at::Tensor& c, const at::Tensor& h, double ridge);

/// M = triu(C Uᵀ, 1) U, U = R⁻¹, by two triangular solves in the factor's column order: the later columns
/// make up for what the deviation of the input does through each column. c [C, C] f32 CPU -> [C, C] f32 in
/// original column order, in f64. Source   Li et al., GPTAQ (2025), P; there a = ¼. Differs  there the
/// deviation is weighted with the column
///          as the loop has changed it, here with the original one, whose output is the target. Then all that
///          the loop would add is known before it starts.
[[nodiscard]] at::Tensor gptaq_correction(const at::Tensor& c, const Factor& factor);

/// W + strength·W·M in f32. w [R, C] any float dtype -> [R, C] f32.
[[nodiscard]] at::Tensor corrected(const at::Tensor& w, const at::Tensor& m, double strength);

/// Asymmetric objective of Ŵ minus that of W, in f64: 0 for Ŵ = W, negative when Ŵ makes up for more than it
/// adds. w, w_hat [R, C]; h, c [C, C].
[[nodiscard]] double asymmetric_objective(const at::Tensor& w, const at::Tensor& w_hat, const at::Tensor& h,
                                          const at::Tensor& c);

}  // namespace isobath::quant
