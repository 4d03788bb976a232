#pragma once
#include <cstdint>

/// AMX parts of `kernels::add_gram`: bf16 products of packed panels on tile registers. Call only where
/// `kernels::has_amx()`.
///
/// A "pair" is two bf16 values of successive tokens in one 32-bit word, as on AVX-512. A tile is 16 rows of
/// 16 words; TDPBF16PS multiplies a left one, rows of one channel and 16 pairs, by a right one, rows of one
/// pair and 16 channels. So a step takes 32 tokens, and a panel is packed both ways, missing tokens and
/// channels zero: as right operand [16 · n_steps, kGramPanel] pairs, then as left operand [kGramPanel / 16,
/// n_steps] tiles.
namespace isobath::kernels::amx {

inline constexpr int64_t kSide = 16;       ///< rows of a tile, and words in each
inline constexpr int64_t kGramPanel = 48;  ///< channels of a packed panel
inline constexpr int64_t kTokensPerStep = 2 * kSide;

/// Words of a panel of n_tokens, both ways.
[[nodiscard]] constexpr int64_t gram_panel_size(int64_t n_tokens) {
  return (n_tokens + kTokensPerStep - 1) / kTokensPerStep * kTokensPerStep * kGramPanel;
}

/// Packs as `avx512::pack_gram_panel` does, both ways.
[[nodiscard]] bool pack_gram_panel(const uint16_t* x, int64_t row_stride, int64_t n_rows, int64_t n_channels,
                                   const float* roots, uint32_t* packed);

void lay_out_tiles();
void release_tiles();

/// Tile registers of this thread, laid out for `add_gram_tiles` while it lives; given back at its end, so
/// that switches between threads do not save them. No other user of tiles may run in between.
class TileRegisters {
 public:
  TileRegisters() { lay_out_tiles(); }
  ~TileRegisters() { release_tiles(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

/// c[i, j] += Σ_t rows[t, i] · columns[t, j] for i < n_rows, j < n_columns, of two panels of n_tokens.
///
/// Rounding every step sums the first and the second tokens of its pairs apart, and adds both to the sum of
///          the steps before, all in f32 and to nearest; subnormals count as zero. That sum starts at 0 and
///          is added to c at its end.
///
/// Precondition: a TileRegisters lives on this thread.
void add_gram_tiles(const uint32_t* rows_panel, const uint32_t* columns_panel, int64_t n_tokens,
                    int64_t n_rows, int64_t n_columns, float* c, int64_t c_stride);

}  // namespace isobath::kernels::amx
