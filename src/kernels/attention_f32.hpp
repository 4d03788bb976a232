#pragma once
#include <vector>

#include "avx2/attention.hpp"

namespace isobath::kernels {

/// Attention of f32 heads by `avx2`, as `attention.cpp` calls it; the parts are those of `Bf16Attention`.
struct F32Attention {
  using Scalar = float;
  using Value = float;
  using Floats = std::vector<float>;
  static constexpr int64_t kHeadDimDivisor = avx2::kKeyTile;

  static Floats gathered(HeadShape shape, Rows<const float> rows, Angles angles) {
    Floats to(avx2::padded_length(shape.n_tokens) * shape.head_dim);
    avx2::gather_rows(shape, rows, angles, to.data());
    return to;
  }
  static Floats packed(HeadShape shape, const Floats& rows) {
    Floats to(rows.size());
    avx2::pack_keys(shape, rows.data(), to.data());
    return to;
  }

  struct Keys {
    Keys(HeadShape shape, Angles angles, Rows<const float> k, Rows<const float> v)
        : packed_keys(packed(shape, gathered(shape, k, angles))), values(gathered(shape, v, {})) {}
    Floats packed_keys, values;
  };

  class Forward {
   public:
    Forward(HeadShape shape, Angles angles)
        : shape_(shape), angles_(angles), scratch_(avx2::attention_scratch(shape)) {}
    void run(Rows<const float> q, const Keys& keys, Rows<float> out, float* log_sums) {
      const Floats rotated = gathered(shape_, q, angles_);
      avx2::attend_queries(shape_, rotated.data(), keys.packed_keys.data(), keys.values.data(), out, log_sums,
                           scratch_.data());
    }

   private:
    HeadShape shape_;
    Angles angles_;
    Floats scratch_;
  };

  struct BackwardKeys {
    BackwardKeys(HeadShape shape, Angles angles, Rows<const float> k, Rows<const float> v)
        : key_rows(gathered(shape, k, angles)),
          packed_keys(packed(shape, key_rows)),
          packed_values(packed(shape, gathered(shape, v, {}))) {}
    Floats key_rows, packed_keys, packed_values;
  };

  class Backward {
   public:
    Backward(HeadShape shape, Angles angles)
        : shape_(shape),
          angles_(angles),
          scratch_(avx2::attention_scratch(shape)),
          deltas_(shape.n_tokens),
          query_gradients_(n_gradients(shape)) {}
    static int64_t n_gradients(HeadShape shape) {
      return avx2::padded_length(shape.n_tokens) * shape.head_dim;
    }
    void add(Rows<const float> q, const BackwardKeys& keys, Rows<const float> out, Rows<const float> gradient,
             const float* log_sums, Rows<float> dq, float* key_gradients, float* value_gradients) {
      const Floats query_rows = gathered(shape_, q, angles_), gradient_rows = gathered(shape_, gradient, {});
      avx2::dot_rows(shape_, out, gradient, deltas_.data());
      avx2::attend_backward(shape_,
                            {.queries = query_rows.data(),
                             .gradients = gradient_rows.data(),
                             .keys = keys.key_rows.data(),
                             .packed_keys = keys.packed_keys.data(),
                             .packed_values = keys.packed_values.data(),
                             .log_sums = log_sums,
                             .deltas = deltas_.data()},
                            query_gradients_.data(), key_gradients, value_gradients, scratch_.data());
      avx2::scatter_rows(shape_, query_gradients_.data(), angles_, dq);
    }
    static void finish(HeadShape shape, Angles angles, const float* key_gradients,
                       const float* value_gradients, Rows<float> dk, Rows<float> dv) {
      avx2::scatter_rows(shape, key_gradients, angles, dk);
      avx2::scatter_rows(shape, value_gradients, {}, dv);
    }

   private:
    HeadShape shape_;
    Angles angles_;
    Floats scratch_, deltas_, query_gradients_;
  };
};

}  // namespace isobath::kernels
