#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/grid.hpp>

#include "candidates.hpp"
#include "cuda/columns.hpp"
#include "storage.hpp"

namespace isobath::quant {

/// What the device's kernels need of a grid's rules. factors: shrink factors of the clip search, on the
/// device; they must outlive the rules. Undefined where nothing is fitted.
inline cuda::GridRules device_rules(const GridSpec& spec, const at::Tensor& factors) {
  const StorageFormat format = storage_format(spec.storage);
  return {.format = {.dropped_bits = format.dropped_bits,
                     .bias = format.bias,
                     .odd = format.odd,
                     .mask = format.mask,
                     .subnormal_below = format.subnormal_below,
                     .smallest = format.smallest,
                     .largest = format.largest},
          .bits = spec.bits,
          .is_symmetric = spec.symmetric,
          .is_searched = spec.clip_search,
          .smallest_searched = kSmallestSearched,
          .largest_searched = kLargestSearched,
          .n_refinements = kRefinements,
          .max_zeros = kMaxZeros,
          .factors = factors.defined() ? factors.const_data_ptr<float>() : nullptr,
          .n_factors = factors.defined() ? static_cast<int>(factors.numel()) : 0};
}

}  // namespace isobath::quant
