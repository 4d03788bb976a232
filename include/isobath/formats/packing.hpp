#pragma once
#include <ATen/core/Tensor.h>

namespace isobath::formats {

/// Dense little-endian bit stream along the last dimension (FORMATS §2.3; compressed-tensors >= 0.18).
/// codes [R, C] i8 signed b-bit -> [R, ceil(C·b/32)] i32, each value stored as code + 2^(b−1).
[[nodiscard]] at::Tensor pack_rows(const at::Tensor& codes, int bits);
/// The inverse. words [R, ceil(columns·b/32)] i32 -> [R, columns] i8.
[[nodiscard]] at::Tensor unpack_rows(const at::Tensor& words, int bits, int64_t columns);
/// Along dimension 0 (packed zero points): [R, G] i8 -> [ceil(R·b/32), G] i32, and back.
[[nodiscard]] at::Tensor pack_columns(const at::Tensor& codes, int bits);
[[nodiscard]] at::Tensor unpack_columns(const at::Tensor& words, int bits, int64_t rows);

}  // namespace isobath::formats
