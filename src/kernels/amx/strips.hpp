#pragma once
#include "../lanes.hpp"
#include "gram.hpp"

/// What AMX packs and adds, apart from the tile instructions: plain C++ that a machine without them tests,
/// too. Everything is inlined into sources of different targets.
namespace isobath::kernels::amx {

inline constexpr int64_t kTileWords = kSide * kSide;

/// A row of a tile. Loaded from and stored to any address.
using Words = uint32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64), aligned(4), may_alias));

/// Exchanges word j + kStep of row i with word j of row i + kStep, for every i and j without the bit kStep.
template <unsigned kStep>
ISOBATH_INLINE void exchange(Words (&rows)[kSide]) {
  const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  // Lanes of both rows after one another, as __builtin_shuffle counts them.
  const Words skip = (lane & kStep) / kStep * (16U - kStep);
  const Words to_lower = lane + skip, to_upper = lane + skip + kStep;
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if ((i & kStep) != 0) continue;
    const Words lower = rows[i], upper = rows[i + kStep];
    rows[i] = __builtin_shuffle(lower, upper, to_lower);
    rows[i + kStep] = __builtin_shuffle(lower, upper, to_upper);
  }
}

/// to[i, j] = from[j, i], 16 x 16 words, rows of `to` side by side.
ISOBATH_INLINE void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to) {
  Words rows[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(&rows[i], from + i * from_stride, sizeof(Words));
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) __builtin_memcpy(to + i * kSide, &rows[i], sizeof(Words));
}

ISOBATH_INLINE int64_t steps(int64_t n_tokens) {
  return (n_tokens + kTokensPerStep - 1) / kTokensPerStep;
}

/// Completes a panel whose pairs of n_tokens are packed: pads them to whole steps and packs the tiles.
ISOBATH_INLINE void complete_panel(uint32_t* packed, int64_t n_tokens) {
  const int64_t n_steps = steps(n_tokens), n_words = n_steps * kSide * kGramPanel;
  for (int64_t i = (n_tokens + 1) / 2 * kGramPanel; i < n_words; ++i) packed[i] = 0;
  uint32_t* tile = packed + n_words;
  for (int64_t channel = 0; channel < kGramPanel; channel += kSide)
    for (int64_t step = 0; step < n_steps; ++step, tile += kTileWords)
      transpose(packed + step * kSide * kGramPanel + channel, kGramPanel, tile);
}

/// As `add_gram_tiles`, in strips of 16 x kGramPanel sums held by Strip: `clear`, `multiply_add` of a left
/// tile and kGramPanel columns of pairs, `store` to [16, kGramPanel].
template <class Strip>
ISOBATH_INLINE void add_strips(const uint32_t* rows_panel, const uint32_t* columns_panel, int64_t n_tokens,
                               int64_t n_rows, int64_t n_columns, float* c, int64_t c_stride) {
  const int64_t n_steps = steps(n_tokens);
  const uint32_t* left = rows_panel + n_steps * kSide * kGramPanel;
  Strip strip;
  for (int64_t row = 0; row < n_rows; row += kSide) {
    const int64_t n_full = n_rows - row < kSide ? n_rows - row : kSide;
    // C comes from far away: asked for now, it is there when the sums are done.
    for (int64_t r = 0; r < n_full; ++r)
      for (int64_t j = 0; j < n_columns; j += kSide) __builtin_prefetch(c + (row + r) * c_stride + j, 1);
    strip.clear();
    for (int64_t step = 0; step < n_steps; ++step, left += kTileWords)
      strip.multiply_add(left, columns_panel + step * kSide * kGramPanel);
    alignas(64) float sums[kSide * kGramPanel];
    strip.store(sums);
    for (int64_t r = 0; r < n_full; ++r) {
      float* target = c + (row + r) * c_stride;
      const float* from = sums + r * kGramPanel;
      if (n_columns == kGramPanel) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < kGramPanel; j += kSide)
          *reinterpret_cast<Floats*>(target + j) += *reinterpret_cast<const Floats*>(from + j);
      } else {
        for (int64_t j = 0; j < n_columns; ++j) target[j] += from[j];
      }
    }
  }
}

}  // namespace isobath::kernels::amx
