#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <isobath/quant/grid.hpp>

namespace isobath::quant::reference {

/// The value as a checkpoint of `dtype` holds it, by c10's own conversions.
inline double stored(double value, at::ScalarType dtype) {
  const auto single = static_cast<float>(value);
  if (dtype == at::kBFloat16) return static_cast<float>(c10::BFloat16(single));
  if (dtype == at::kHalf) return static_cast<float>(c10::Half(single));
  return single;
}

}  // namespace isobath::quant::reference
