#include <isobath/core/error.hpp>

#include "cuda/refine.hpp"

namespace isobath::quant::cuda {

[[noreturn]] static void no_device() {
  fail<InternalError>("a CUDA tensor in a build without CUDA (ISOBATH_WITH_CUDA=OFF)");
}

int fit_groups(const float*, int64_t, int64_t, int64_t, const float*, const GridRules&, Grids, Stream) {
  no_device();
}
int settle_columns(const Block&, int, int, float*, float*, Stream) {
  no_device();
}
int solve_columns(const Block&, int, int, const GridRules&, Grids, const Rounded&, Stream) {
  no_device();
}
int refine_codes(const RefinedColumns&, const int64_t*, int64_t, const GridRules&, Grids, Stream) {
  no_device();
}
int refine_grid(const RefinedColumns&, const float*, const GridRules&, Grids, Stream) {
  no_device();
}

}  // namespace isobath::quant::cuda
