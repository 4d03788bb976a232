#include <ATen/ATen.h>

#include <isobath/core/error.hpp>
#include <isobath/formats/packing.hpp>

namespace isobath::formats {

at::Tensor pack_rows(const at::Tensor& codes, int bits) {
  ISOBATH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kChar, "codes must be [R, C] i8");
  ISOBATH_CHECK(1 <= bits && bits <= 8, "{} bits", bits);
  const int64_t n_rows = codes.size(0), n_columns = codes.size(1), n_words = (n_columns * bits + 31) / 32;
  const at::Tensor from = codes.contiguous();
  at::Tensor words = at::zeros({n_rows, n_words}, at::kInt);
  const int offset = 1 << (bits - 1);
  const uint32_t mask = (1U << bits) - 1U;
  for (int64_t row = 0; row < n_rows; ++row) {
    const int8_t* code = from.const_data_ptr<int8_t>() + row * n_columns;
    int32_t* word = words.mutable_data_ptr<int32_t>() + row * n_words;
    uint64_t pending = 0;
    int n_pending = 0;
    for (int64_t j = 0; j < n_columns; ++j) {
      pending |= static_cast<uint64_t>(static_cast<uint32_t>(code[j] + offset) & mask) << n_pending;
      n_pending += bits;
      if (n_pending >= 32) {
        *word++ = static_cast<int32_t>(static_cast<uint32_t>(pending));
        pending >>= 32;
        n_pending -= 32;
      }
    }
    if (n_pending > 0) *word = static_cast<int32_t>(static_cast<uint32_t>(pending));
  }
  return words;
}

at::Tensor unpack_rows(const at::Tensor& words, int bits, int64_t columns) {
  ISOBATH_CHECK(words.dim() == 2 && words.scalar_type() == at::kInt, "words must be [R, W] i32");
  ISOBATH_CHECK(1 <= bits && bits <= 8, "{} bits", bits);
  const int64_t n_rows = words.size(0), n_words = (columns * bits + 31) / 32;
  if (words.size(1) != n_words) {
    fail<DataError>(
        "{} columns of {} bits take {} words per row, found {}; compressed-tensors before 0.18 packed 3, 5, "
        "6 and 7 bits "
        "otherwise, re-save such a checkpoint with a newer version",
        columns, bits, n_words, words.size(1));
  }
  const at::Tensor from = words.contiguous();
  at::Tensor codes = at::empty({n_rows, columns}, at::kChar);
  const int offset = 1 << (bits - 1);
  const uint32_t mask = (1U << bits) - 1U;
  for (int64_t row = 0; row < n_rows; ++row) {
    const int32_t* word = from.const_data_ptr<int32_t>() + row * n_words;
    int8_t* code = codes.mutable_data_ptr<int8_t>() + row * columns;
    uint64_t pending = 0;
    int n_pending = 0;
    for (int64_t j = 0; j < columns; ++j) {
      if (n_pending < bits) {
        pending |= static_cast<uint64_t>(static_cast<uint32_t>(*word++)) << n_pending;
        n_pending += 32;
      }
      code[j] = static_cast<int8_t>(static_cast<int>(pending & mask) - offset);
      pending >>= bits;
      n_pending -= bits;
    }
  }
  return codes;
}

at::Tensor pack_columns(const at::Tensor& codes, int bits) {
  return pack_rows(codes.t(), bits).t().contiguous();
}

at::Tensor unpack_columns(const at::Tensor& words, int bits, int64_t rows) {
  return unpack_rows(words.t(), bits, rows).t().contiguous();
}

}  // namespace isobath::formats
