#pragma once
#include <ATen/core/Tensor.h>

/// Sums of squares of activations and gradients, without copies of them. bf16 on a CPU with AVX-512 BF16 and
/// f32 on one with AVX2 read each value once; elsewhere the same comes from ATen operations in f32. Local;
/// not finite where a value is not, or where a square leaves the range of f32.
namespace isobath::kernels {

/// Σ_j x_ij² of x [.., d], f32 [..].
[[nodiscard]] at::Tensor row_squares(const at::Tensor& x);

/// Sums over the tokens of one sequence, for each channel.
struct ChannelSquares {
  at::Tensor plain;     ///< [d] f64: Σ_i x_ij²
  at::Tensor weighted;  ///< [d] f64: Σ_i w_i x_ij²
  at::Tensor largest;   ///< [d] f32: max_i |x_ij|
};
/// x [n, d] any float dtype, weights [n] f32, n > 0; results on the CPU. Sums run in f32 over 64 tokens, and
/// in f64 over those.
[[nodiscard]] ChannelSquares channel_squares(const at::Tensor& x, const at::Tensor& weights);

}  // namespace isobath::kernels
