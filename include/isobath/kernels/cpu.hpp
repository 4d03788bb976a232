#pragma once

namespace isobath::kernels {

/// Whether this machine multiplies bf16 with VDPBF16PS and the kernels of this module use it. The environment
/// variable ISOBATH_NO_AVX512_BF16=1 says no, for comparisons; it is part of no fingerprint, so use it for a
/// whole run.
[[nodiscard]] bool has_avx512_bf16();

}  // namespace isobath::kernels
