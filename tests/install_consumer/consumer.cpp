#include <cstdio>
#include <isobath/core/version.hpp>
#include <isobath/quant/grid.hpp>

int main() {
  const isobath::quant::GridSpec spec{.bits = 3, .group = 64};
  const double bits = isobath::quant::bits_per_weight(4096, spec);
  std::printf("isobath %s (%s): %.4f bits per weight\n", isobath::kVersion, isobath::kRevision, bits);
  return bits > 3.0 && bits < 4.0 ? 0 : 1;
}
