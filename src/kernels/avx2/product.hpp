#pragma once
#include <cstdint>

/// AVX2 parts of `kernels/gram.hpp` and `kernels/linear.hpp`: f32 products of packed panels. Call only where
/// `kernels::has_avx2()`.
///
/// An operand of a product C[i, j] = Σ_k a[k, i] b[k, j] is packed in panels of kPanel channels i or j and a
/// number of steps k. As columns (right operand) a panel is [n_steps, kPanel]; as rows (left operand) it is
/// cut into slivers, [kPanel / kSliver, n_steps, kSliver], so that a register tile reads both one after the
/// other. Missing channels are zero.
namespace isobath::kernels::avx2 {

inline constexpr int64_t kPanel = 24, kSliver = 4;

/// Floats of a Gram panel of n_steps tokens: packed both ways, as rows and then as columns.
[[nodiscard]] constexpr int64_t gram_panel_size(int64_t n_steps) {
  return 2 * kPanel * n_steps;
}

/// Packs rows [0, n_rows) of up to kPanel channels of x, times the row's root (null: 1), both ways. A row of
/// root 0 is zero whatever it holds. False when a packed value is not finite or so large that sums of squares
/// might overflow.
[[nodiscard]] bool pack_gram_panel(const float* x, int64_t row_stride, int64_t n_rows, int64_t n_channels,
                                   const float* roots, float* packed);

/// c[i, j] += Σ_k rows[k, i] · columns[k, j] for i < n_rows, j < n_columns, of two Gram panels. The sum over
/// k starts at 0 and is added to c at its end, in the same order for every i and j.
void add_gram_tiles(const float* rows_panel, const float* columns_panel, int64_t n_steps, int64_t n_rows,
                    int64_t n_columns, float* c, int64_t c_stride);

/// Packs channels [0, n_channels) of x, whose channel i and step k stands at x[i · channel_stride + k], as
/// rows.
void pack_rows(const float* x, int64_t channel_stride, int64_t n_steps, int64_t n_channels, float* packed);

/// The same as columns; bf16 words are widened.
void pack_columns(const float* x, int64_t channel_stride, int64_t n_steps, int64_t n_channels, float* packed);
void pack_columns(const uint16_t* x, int64_t channel_stride, int64_t n_steps, int64_t n_channels,
                  float* packed);

/// Packs as columns x whose channel i and step k stands at x[k · step_stride + i]; bf16 words are widened.
void pack_columns_of_rows(const float* x, int64_t step_stride, int64_t n_steps, int64_t n_channels,
                          float* packed);
void pack_columns_of_rows(const uint16_t* x, int64_t step_stride, int64_t n_steps, int64_t n_channels,
                          float* packed);

/// c[i, j] = Σ_k rows[k, i] · columns[k, j], or += with `accumulate`.
void multiply_panels(const float* rows, const float* columns, int64_t n_steps, int64_t n_rows,
                     int64_t n_columns, float* c, int64_t c_stride, bool accumulate);

}  // namespace isobath::kernels::avx2
