#pragma once
#include <ATen/core/Tensor.h>

namespace isobath::kernels {

/// Whether `add_gram` takes this input on this machine.
[[nodiscard]] bool has_gram(const at::Tensor& x);

/// upper[i, j] += Σ_n (√D_n x_ni)(√D_n x_nj) for i <= j; what stands below the diagonal afterwards is
/// unspecified.
///
/// upper    [d, d] f32, contiguous, CPU. x [n, d] bf16, CPU, contiguous rows. roots [n] f32: √D, or undefined
/// (D = 1).
///
/// Rounding √D·x is rounded to bf16 (relative 2⁻⁹ each, exact for D = 1 and powers of 4), products are exact,
/// sums f32
///          in a fixed order. Both factors are the same rounded numbers, so the sum is positive semidefinite.
///
/// Returns  false, and adds nothing, when a value of √D·x is not finite; rows with √D = 0 may hold anything.
///
/// Cost     n·d²/2 multiply-adds at the bf16 rate, n·d bf16 of scratch.
[[nodiscard]] bool add_gram(at::Tensor& upper, const at::Tensor& x, const at::Tensor& roots);

/// sum[i, j] += Σ_n a_ni b_nj for bf16 a, b [n, d], CPU; sum [d, d] f32 contiguous. Exact products, f32 sums
/// in a fixed order. Returns false, and adds nothing, when a value is not finite. Cost: n·d² multiply-adds at
/// the bf16 rate, 2·n·d bf16 of scratch.
[[nodiscard]] bool add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

}  // namespace isobath::kernels
