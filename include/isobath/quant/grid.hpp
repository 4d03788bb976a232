#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace isobath::quant {

/// Which values a weight may take.
struct GridSpec {
  int bits = 4;         ///< 2 3 4 5 6 8
  int64_t group = 128;  ///< consecutive columns that share a scale; 0: the whole row ("channel")
  bool symmetric = true;
  bool clip_search = true;  ///< search scale (and zero) minimising Σ_j h_j (w−ŵ)²; else min–max
  at::ScalarType storage =
      at::ScalarType::BFloat16;  ///< dtype of scales and of dequantized weights in the checkpoint
};

/// Codes of one matrix, or of a tile of its rows. w = (code − zero) · scale, rounded to `storage`.
struct QuantizedMatrix {
  GridSpec spec;
  at::Tensor codes;  ///< [R, C] i8, signed: −2^(b−1) … 2^(b−1)−1
  at::Tensor scale;  ///< [R, G] storage dtype, positive
  at::Tensor zero;   ///< [R, G] i8 signed, in the range of the codes; all 0 when symmetric
};

/// Number of groups of a row; throws ConfigError when the group does not divide the columns (says both).
[[nodiscard]] int64_t n_groups(int64_t columns, const GridSpec& spec);

/// Scale and zero of each row for one group of columns. w [R, g] f32; importance [g] f32 (h_j > 0) or
/// undefined (uniform).
/// -> scale [R] storage dtype, zero [R] i8. Min–max: symmetric scale max|w|/((2^b−1)/2), asymmetric
/// (max−min)/(2^b−1), both rounded to storage first, so that codes are chosen for the scale that is stored.
struct GroupGrid {
  at::Tensor scale, zero;
};
[[nodiscard]] GroupGrid fit_grid(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec);

/// What a loader computes: [R, C] in storage dtype on the matrix's device, (code − zero)·scale in f32 rounded
/// once.
[[nodiscard]] at::Tensor dequantize(const QuantizedMatrix& matrix);

/// w [R, C] rounded on fixed grids (scale, zero [R, G] as in QuantizedMatrix): what `dequantize` gives for
/// the nearest codes, bit for bit, without keeping codes. f32 [R, C], any device. Cost: a few passes over w.
[[nodiscard]] at::Tensor round_on_grid(const at::Tensor& w, const at::Tensor& scale, const at::Tensor& zero,
                                       const GridSpec& spec);

/// Stored bits per weight, scales and (asymmetric) packed zeros included.
[[nodiscard]] double bits_per_weight(int64_t columns, const GridSpec& spec);

}  // namespace isobath::quant
