#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <span>

namespace isobath::io {

inline constexpr int64_t kPieceBytes = int64_t{64} << 20;

/// Hands the elements of a tensor, in C order, to `consume(std::span<const std::byte>)`. A dense CPU tensor
/// goes whole; another is copied in pieces of at most kPieceBytes (or one row), so that writing needs no
/// second copy of the data.
template <class Consume>
void for_each_piece(const at::Tensor& tensor, Consume&& consume) {
  if (tensor.numel() == 0) return;
  const bool is_dense = tensor.is_cpu() && tensor.is_contiguous();
  const int64_t n_rows = is_dense || tensor.dim() == 0 ? 1 : tensor.size(0);
  const int64_t row_bytes = static_cast<int64_t>(tensor.nbytes()) / n_rows;
  const int64_t rows_at_once = std::clamp<int64_t>(kPieceBytes / row_bytes, 1, n_rows);
  for (int64_t row = 0; row < n_rows; row += rows_at_once) {
    const at::Tensor part =
        is_dense || tensor.dim() == 0 ? tensor : tensor.narrow(0, row, std::min(rows_at_once, n_rows - row));
    const at::Tensor piece = part.detach().cpu().contiguous();
    consume(std::span(static_cast<const std::byte*>(piece.const_data_ptr()), piece.nbytes()));
  }
}

}  // namespace isobath::io
