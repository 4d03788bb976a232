#pragma once
#include <cstdint>

/// AVX-512 parts of `kernels/elementwise.hpp`: bf16 rows of d values, one pass over memory each.
namespace isobath::kernels::avx512 {

void rms_norm_row(const uint16_t* x, const uint16_t* weight, int64_t d, float eps, uint16_t* to);

/// to := residual + the gradient of rms_norm_row at x for `gradient`.
void rms_norm_backward_row(const uint16_t* x, const uint16_t* weight, int64_t d, float eps,
                           const uint16_t* gradient, const uint16_t* residual, uint16_t* to);

/// to := bf16(silu(gate)) · up.
void gated_row(const uint16_t* gate, const uint16_t* up, int64_t n, uint16_t* to);

void gated_backward_row(const uint16_t* gate, const uint16_t* up, const uint16_t* gradient, int64_t n,
                        uint16_t* gate_gradient, uint16_t* up_gradient);

}  // namespace isobath::kernels::avx512
