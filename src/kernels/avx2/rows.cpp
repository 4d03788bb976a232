#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
// GCC 12 sees its own intrinsics so.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include "tile.hpp"
// After the tile.
#include "../rows_of_lanes.hpp"

namespace isobath::kernels {

template struct ElementwiseRows<float>;
template struct LogitsRows<float>;
template struct SquaresRows<float>;

}  // namespace isobath::kernels
#pragma GCC pop_options
#endif
