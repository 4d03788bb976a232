#pragma once
#include <cstdint>
#include <isobath/kernels/stream.hpp>

/// The device's parts of `kernels::add_gram`. Pointers are of the device; work is put on the stream and not
/// waited for. All return the cudaError_t of the launch; 0: none.
namespace isobath::kernels::cuda {

/// Tokens that the bf16 product takes at once: what `weigh_bf16` writes is a multiple of it.
inline constexpr int64_t kTokenStep = 32;

/// Channels that a 16-byte load takes at once: divides the stride of what `weigh_bf16` writes.
inline constexpr int64_t kChannelStep = 8;

/// Rows of activations, channels contiguous.
template <class Scalar>
struct Rows {
  Scalar* data;
  int64_t stride, n_tokens, n_channels;
};

/// What a product is added to: row i, column j stands at data[i · stride + j].
struct Sum {
  float* data;
  int64_t stride, n_rows, n_columns;
  int64_t first_column;  ///< channel of the first column
  bool is_upper;         ///< only rows up to a column's channel are asked for
};

/// to[n, c] := √D_n x_nc rounded to the dtype, where roots is null x_nc; 0 where √D_n is 0 whatever x holds,
/// and beyond the tokens and channels of x. Sets *is_bad to 1 when a value is not finite, or in f32 beyond
/// 2⁵⁰.
int weigh_bf16(Rows<const uint16_t> x, const float* roots, Rows<uint16_t> to, int* is_bad, Stream stream);
int weigh_f32(Rows<const float> x, const float* roots, Rows<float> to, int* is_bad, Stream stream);

/// sum[i, j] += Σ_n a[n, i] b[n, first_column + j]. Every element belongs to one thread (f32) or warp (bf16),
/// which adds all tokens in one order: the bits depend neither on the launch nor on the other elements.
///
/// bf16: tensor cores; n_tokens a multiple of kTokenStep, stride of kChannelStep, and what pads the channels
/// of a and b up to the stride zero.
int add_product_bf16(Rows<const uint16_t> a, Rows<const uint16_t> b, Sum sum, Stream stream);
int add_product_f32(Rows<const float> a, Rows<const float> b, Sum sum, Stream stream);

}  // namespace isobath::kernels::cuda
