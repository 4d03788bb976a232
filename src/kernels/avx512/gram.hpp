#pragma once
#include <cstdint>

/// AVX-512 BF16 parts of `kernels::add_gram`; call only where `kernels::has_avx512_bf16()`.
namespace isobath::kernels::avx512 {

inline constexpr int64_t kGramPanel = 48;  ///< channels of a packed panel

/// Packs rows [0, n_rows) of up to kGramPanel channels, times the row's root (null: 1), rounded to bf16, as
/// pairs of tokens: packed [⌈n_rows/2⌉, kGramPanel] u32, missing channels and the odd row's partner zero. A
/// row of root 0 is zero whatever it holds. False when a packed value is not finite.
[[nodiscard]] bool pack_gram_panel(const uint16_t* x, int64_t row_stride, int64_t n_rows, int64_t n_channels,
                                   const float* roots, uint32_t* packed);

/// c[i, j] += Σ_p rows_panel[p, i] · columns_panel[p, j] (both bf16 pairs, f32 sums) for i < n_rows, j <
/// n_columns.
void add_gram_tiles(const uint32_t* rows_panel, const uint32_t* columns_panel, int64_t n_pairs,
                    int64_t n_rows, int64_t n_columns, float* c, int64_t c_stride);

}  // namespace isobath::kernels::avx512
