#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
// GCC 12 sees its own intrinsics so.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "tile.hpp"
// After the tile.
#include "../rows_of_lanes.hpp"

namespace isobath::kernels {

template struct ElementwiseRows<uint16_t>;
template struct LogitsRows<uint16_t>;
template struct SquaresRows<uint16_t>;

}  // namespace isobath::kernels
#pragma GCC pop_options
#endif
