#pragma once
#include <cstdint>

/// What the attention kernels of every target are given: one head of one sequence.
namespace isobath::kernels {

/// Rows of one head: row t at data + t · stride, head_dim values each.
template <class Value>
struct Rows {
  Value* data;
  int64_t stride;
};

/// Rotary tables [n_tokens, head_dim] f32, both halves filled.
struct Angles {
  const float* cos;
  const float* sin;
};

struct HeadShape {
  int64_t n_tokens, head_dim;
  float scale;  ///< of the scores
};

}  // namespace isobath::kernels
