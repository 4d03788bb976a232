#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <type_traits>

/// Matrix fragments of 16 × 16: every lane holds whole factors and, of a sum, the elements that it computes;
/// which ones is as unspecified for callers as on a device. Products are added in order, in f32 and rounded.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

inline constexpr int kSize = 16;

template <class Use, int kRows, int kColumns, int kDepth, class T, class Layout = void>
struct fragment {
  static_assert(kRows == kSize && kColumns == kSize && kDepth == kSize);
  float x[kSize * kSize];  // [row, column]
};
template <int kRows, int kColumns, int kDepth>
struct fragment<accumulator, kRows, kColumns, kDepth, float, void> {
  static constexpr int num_elements = kSize * kSize / 32;
  float x[num_elements];  // elements lane · num_elements … of [row, column]
};

template <class Use, class Layout>
void load_matrix_sync(fragment<Use, kSize, kSize, kSize, __nv_bfloat16, Layout>& to,
                      const __nv_bfloat16* from, unsigned pitch) {
  for (int row = 0; row < kSize; ++row)
    for (int column = 0; column < kSize; ++column) {
      const unsigned at = std::is_same_v<Layout, row_major> ? row * pitch + column : column * pitch + row;
      to.x[row * kSize + column] = __uint_as_float(uint32_t{from[at].bits} << 16);
    }
}

using Sum = fragment<accumulator, kSize, kSize, kSize, float, void>;

inline void fill_fragment(Sum& to, float value) {
  std::fill_n(to.x, Sum::num_elements, value);
}

template <class LeftLayout, class RightLayout>
void mma_sync(Sum& to, const fragment<matrix_a, kSize, kSize, kSize, __nv_bfloat16, LeftLayout>& a,
              const fragment<matrix_b, kSize, kSize, kSize, __nv_bfloat16, RightLayout>& b, const Sum& c) {
  for (int e = 0; e < Sum::num_elements; ++e) {
    const int at = static_cast<int>(threadIdx.x % 32) * Sum::num_elements + e;
    float sum = c.x[e];
    for (int k = 0; k < kSize; ++k) sum += a.x[at / kSize * kSize + k] * b.x[k * kSize + at % kSize];
    to.x[e] = sum;
  }
}

inline void store_matrix_sync(float* to, const Sum& from, unsigned pitch, layout_t) {
  for (int e = 0; e < Sum::num_elements; ++e) {
    const unsigned at = threadIdx.x % 32 * Sum::num_elements + static_cast<unsigned>(e);
    to[at / kSize * pitch + at % kSize] = from.x[e];
  }
}

}  // namespace nvcuda::wmma
