#pragma once
#include <cstdint>

namespace isobath {

/// Where tensors of the host live from now on: those of kMappedBytes and more in mappings of their own, of
/// huge pages where the system has them, which are kept when a tensor goes and given to the next one of the
/// same size. Kept mappings are unmapped, the oldest first, before a new one would make all of them larger
/// than 17/16 of what tensors once held at the same time: a pass costs the memory of the tensors that live at
/// its peak, without holes, and what repeats itself touches no new page. Smaller tensors stay with the C
/// library.
///
/// Call once, before the first tensor and before other threads; not collective. Throws nothing.
void map_tensors();

inline constexpr int64_t kMappedBytes = int64_t{1} << 18;

struct TensorMemory {
  int64_t live_bytes;  ///< of tensors that live, in whole mappings
  int64_t kept_bytes;  ///< of mappings without a tensor
  int64_t peak_bytes;  ///< the largest live_bytes since map_tensors or the last unmap_kept_tensors
};
/// All zero without map_tensors.
[[nodiscard]] TensorMemory tensor_memory();

/// Unmaps what is kept, and starts a new peak: for the end of a pass.
void unmap_kept_tensors();

}  // namespace isobath
