#include "gram.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,amx-tile,amx-bf16")
#include "../avx512/gram.hpp"
#include "strips.hpp"

namespace isobath::kernels::amx {
namespace {

static_assert(avx512::kGramPanel == kGramPanel && kGramPanel == 3 * kSide);

/// What LDTILECFG reads. A constant, since the compiler does not know that the instruction reads all of it.
struct alignas(64) Layout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t n_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Layout) == 64 && kSide * sizeof(uint32_t) == 64);
constexpr Layout kLayout;

/// Sums in registers 0 to 2, a left tile in 3, right ones in 4 to 6: the next step's loads need not wait.
struct Strip {
  ISOBATH_INLINE void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }
  ISOBATH_INLINE void multiply_add(const uint32_t* left, const uint32_t* right) {
    constexpr int64_t kRowBytes = kGramPanel * sizeof(uint32_t);
    _tile_loadd(3, left, kSide * sizeof(uint32_t));
    _tile_loadd(4, right, kRowBytes);
    _tile_dpbf16ps(0, 3, 4);
    _tile_loadd(5, right + kSide, kRowBytes);
    _tile_dpbf16ps(1, 3, 5);
    _tile_loadd(6, right + 2 * kSide, kRowBytes);
    _tile_dpbf16ps(2, 3, 6);
  }
  ISOBATH_INLINE void store(float* to) const {
    constexpr int64_t kRowBytes = kGramPanel * sizeof(float);
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + kSide, kRowBytes);
    _tile_stored(2, to + 2 * kSide, kRowBytes);
  }
};

}  // namespace

void lay_out_tiles() {
  _tile_loadconfig(&kLayout);
}

void release_tiles() {
  _tile_release();
}

bool pack_gram_panel(const uint16_t* x, int64_t row_stride, int64_t n_rows, int64_t n_channels,
                     const float* roots, uint32_t* packed) {
  const bool is_usable = avx512::pack_gram_panel(x, row_stride, n_rows, n_channels, roots, packed);
  complete_panel(packed, n_rows);
  return is_usable;
}

void add_gram_tiles(const uint32_t* rows_panel, const uint32_t* columns_panel, int64_t n_tokens,
                    int64_t n_rows, int64_t n_columns, float* c, int64_t c_stride) {
  add_strips<Strip>(rows_panel, columns_panel, n_tokens, n_rows, n_columns, c, c_stride);
}

}  // namespace isobath::kernels::amx
#pragma GCC pop_options
#endif
