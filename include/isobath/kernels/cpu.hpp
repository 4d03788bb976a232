#pragma once
#include <c10/core/ScalarType.h>

#include <string_view>

/// Which implementation of this module's functions runs on this machine, decided once a process. The
/// environment variable ISOBATH_KERNELS=aten|avx2|avx512|amx caps it, for comparisons; any other value throws
/// ConfigError.
namespace isobath::kernels {

/// bf16 tensors go through kernels on VDPBF16PS.
[[nodiscard]] bool has_avx512_bf16();

/// Products of bf16 Gram matrices go through tile registers, the other functions of bf16 through AVX-512.
/// Asks Linux for the registers, on behalf of the process, when it is first called; false where that is
/// refused.
[[nodiscard]] bool has_amx();

/// f32 tensors go through kernels on AVX2 and FMA.
[[nodiscard]] bool has_avx2();

/// "amx", "avx512", "avx2" or "aten": what takes CPU tensors of this dtype. Results differ between them in
/// rounding, so it belongs to the fingerprint of a run.
[[nodiscard]] std::string_view implementation_of(c10::ScalarType dtype);

}  // namespace isobath::kernels
