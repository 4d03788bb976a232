#pragma once
#include <ATen/core/Tensor.h>

#include <span>

/// Symmetric and plain products XᵀX and AᵀB of activations [n, d] with f32 sums: bf16 on CPUs with AMX or
/// AVX-512 BF16, f32 on CPUs with AVX2, both on CUDA devices. Every sum is made in one order, whatever the
/// threads and whichever part of the matrix is asked for. Local.
namespace isobath::kernels {

/// Whether the functions below take this input on this machine.
[[nodiscard]] bool has_gram(const at::Tensor& x);

/// upper[i, j] += Σ_n (√D_n x_ni)(√D_n x_nj) for i <= j; what stands below the diagonal afterwards is
/// unspecified.
///
/// upper    [d, d] f32, contiguous. x [n, d] bf16 or f32, contiguous rows. roots [n] f32: √D, or undefined
/// (D = 1). All on the CPU or on one CUDA device.
///
/// Rounding √D·x is rounded to x's dtype (bf16: relative 2⁻⁹ each, exact for D = 1 and powers of 4); products
///          of bf16 are exact, sums f32 in a fixed order, for 256 (f32 on CPUs: 128) tokens at a time before
///          they meet the total (on AMX made of sums of 32, on a device in the order of its tensor cores, cut
///          off and not rounded). Both factors are the same rounded numbers, so the sum is positive
///          semidefinite.
///
/// Returns  false, and adds nothing, when a value of √D·x is not finite, or in f32 beyond 2⁵⁰, where sums of
///          squares might overflow; rows with √D = 0 may hold anything.
///
/// Cost     n·d²/2 multiply-adds at the rate of the dtype; scratch: 512·d words of 2 (bf16) or 8 (f32) bytes,
///          1024·d of 4 (bf16 on AMX); on a device n·d numbers of the dtype, and one wait for it.
[[nodiscard]] bool add_gram(at::Tensor& upper, const at::Tensor& x, const at::Tensor& roots);

/// Divides the columns at which panels start.
inline constexpr int64_t kGramAlignment = 48;

/// Panels of columns of the same sum, side by side from column `begin` on, for matrices too large to hold:
/// of one that starts at column b, panel[i, j] += Σ_n (√D_n x_ni)(√D_n x_n,b+j) for i <= b + j; the rest is
/// unspecified. Gives the bits that `add_gram` gives there.
///
/// panels   [b + w, w] f32 each, contiguous; every b a multiple of kGramAlignment. x [n, >= the last b + w]:
///          later channels are neither read nor checked.
///
/// Cost     n·w·(b + w/2) multiply-adds each, and packing of the last b + w channels.
[[nodiscard]] bool add_gram_panels(std::span<at::Tensor> panels, int64_t begin, const at::Tensor& x,
                                   const at::Tensor& roots);

/// sum[i, j] += Σ_n a_ni b_nj for a [n, d], b [n, w] of one dtype and device; sum [d, w] f32 contiguous. f32
/// sums in a fixed order. Returns false, and adds nothing, on values that `add_gram` refuses. Cost: n·d·w
/// multiply-adds at the rate of the dtype, twice the scratch of `add_gram`.
[[nodiscard]] bool add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

/// The same where the sum lies in panels [d, w] side by side, each but the last a multiple of kGramAlignment
/// wide: packs a and b once.
[[nodiscard]] bool add_product(std::span<at::Tensor> panels, const at::Tensor& a, const at::Tensor& b);

}  // namespace isobath::kernels
