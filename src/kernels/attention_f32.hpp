#pragma once
#include <algorithm>
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

  class Backward {
   public:
    Backward(HeadShape shape, Angles angles)
        : shape_(shape),
          angles_(angles),
          scratch_(avx2::attention_scratch(shape)),
          deltas_(shape.n_tokens),
          query_gradients_(avx2::padded_length(shape.n_tokens) * shape.head_dim),
          key_gradients_(query_gradients_.size()),
          value_gradients_(query_gradients_.size()) {}
    void start(Rows<const float> k, Rows<const float> v) {
      key_rows_ = gathered(shape_, k, angles_);
      packed_keys_ = packed(shape_, key_rows_);
      packed_values_ = packed(shape_, gathered(shape_, v, {}));
      std::fill(key_gradients_.begin(), key_gradients_.end(), 0.0F);
      std::fill(value_gradients_.begin(), value_gradients_.end(), 0.0F);
    }
    void add(Rows<const float> q, Rows<const float> out, Rows<const float> gradient, const float* log_sums,
             Rows<float> dq) {
      const Floats query_rows = gathered(shape_, q, angles_), gradient_rows = gathered(shape_, gradient, {});
      avx2::dot_rows(shape_, out, gradient, deltas_.data());
      avx2::attend_backward(shape_,
                            {.queries = query_rows.data(),
                             .gradients = gradient_rows.data(),
                             .keys = key_rows_.data(),
                             .packed_keys = packed_keys_.data(),
                             .packed_values = packed_values_.data(),
                             .log_sums = log_sums,
                             .deltas = deltas_.data()},
                            query_gradients_.data(), key_gradients_.data(), value_gradients_.data(),
                            scratch_.data());
      avx2::scatter_rows(shape_, query_gradients_.data(), angles_, dq);
    }
    void finish(Rows<float> dk, Rows<float> dv) {
      avx2::scatter_rows(shape_, key_gradients_.data(), angles_, dk);
      avx2::scatter_rows(shape_, value_gradients_.data(), {}, dv);
    }

   private:
    HeadShape shape_;
    Angles angles_;
    Floats scratch_, deltas_, query_gradients_, key_gradients_, value_gradients_;
    Floats key_rows_, packed_keys_, packed_values_;
  };
};

}  // namespace isobath::kernels
