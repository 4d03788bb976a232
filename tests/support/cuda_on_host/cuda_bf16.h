#pragma once
#include <cstdint>

/// Storage only: what multiplies it is in mma.h.
struct __nv_bfloat16 {
  uint16_t bits;
};
