#pragma once
#include <c10/util/BFloat16.h>

#include <vector>

#include "avx512/attention.hpp"

namespace isobath::kernels {

/// Attention of bf16 heads by `avx512`, as `attention.cpp` calls it: Keys and BackwardKeys of one kv head,
/// one query head forward and backward. Backward adds to a query head's share of its kv head's gradients, f32
/// [padded tokens, head_dim], which `finish` rotates back and rounds.
struct Bf16Attention {
  using Scalar = c10::BFloat16;
  using Value = uint16_t;
  using Pairs = std::vector<uint32_t>;
  static constexpr int64_t kHeadDimDivisor = 32;

  static std::vector<uint16_t> gathered(HeadShape shape, Rows<const uint16_t> rows, Angles angles) {
    std::vector<uint16_t> to(avx512::padded_length(shape.n_tokens) * shape.head_dim);
    avx512::gather_rows(shape, rows, angles, to.data());
    return to;
  }
  static Pairs channel_pairs(HeadShape shape, const std::vector<uint16_t>& rows) {
    Pairs to(rows.size() / 2);
    avx512::pair_channels(shape, rows.data(), to.data());
    return to;
  }
  static Pairs token_pairs(HeadShape shape, const std::vector<uint16_t>& rows) {
    Pairs to(rows.size() / 2);
    avx512::pair_tokens(shape, rows.data(), to.data());
    return to;
  }

  struct Keys {
    Keys(HeadShape shape, Angles angles, Rows<const uint16_t> k, Rows<const uint16_t> v)
        : key_channels(channel_pairs(shape, gathered(shape, k, angles))),
          value_tokens(token_pairs(shape, gathered(shape, v, {}))) {}
    Pairs key_channels, value_tokens;
  };

  class Forward {
   public:
    Forward(HeadShape shape, Angles angles)
        : shape_(shape),
          angles_(angles),
          scratch_(avx512::kQueryTile * avx512::padded_length(shape.n_tokens)),
          scratch_bf16_(scratch_.size()) {}
    void run(Rows<const uint16_t> q, const Keys& keys, Rows<uint16_t> out, float* log_sums) {
      const std::vector<uint16_t> rotated = gathered(shape_, q, angles_);
      avx512::attend_queries(shape_, rotated.data(), keys.key_channels.data(), keys.value_tokens.data(), out,
                             log_sums, scratch_.data(), scratch_bf16_.data());
    }

   private:
    HeadShape shape_;
    Angles angles_;
    std::vector<float> scratch_;
    std::vector<uint16_t> scratch_bf16_;
  };

  struct BackwardKeys {
    BackwardKeys(HeadShape shape, Angles angles, Rows<const uint16_t> k, Rows<const uint16_t> v) {
      const std::vector<uint16_t> key_rows = gathered(shape, k, angles);
      key_channels = channel_pairs(shape, key_rows);
      key_tokens = token_pairs(shape, key_rows);
      value_channels = channel_pairs(shape, gathered(shape, v, {}));
    }
    Pairs key_channels, key_tokens, value_channels;
  };

  class Backward {
   public:
    Backward(HeadShape shape, Angles angles)
        : shape_(shape),
          angles_(angles),
          scratch_(avx512::backward_scratch(shape)),
          deltas_(avx512::padded_length(shape.n_tokens)),
          query_gradients_(n_gradients(shape)) {}
    static int64_t n_gradients(HeadShape shape) {
      return avx512::padded_length(shape.n_tokens) * shape.head_dim;
    }
    void add(Rows<const uint16_t> q, const BackwardKeys& keys, Rows<const uint16_t> out,
             Rows<const uint16_t> gradient, const float* log_sums, Rows<uint16_t> dq, float* key_gradients,
             float* value_gradients) {
      const std::vector<uint16_t> query_rows = gathered(shape_, q, angles_);
      const std::vector<uint16_t> gradient_rows = gathered(shape_, gradient, {});
      const Pairs query_tokens = token_pairs(shape_, query_rows),
                  gradient_tokens = token_pairs(shape_, gradient_rows);
      avx512::dot_rows(shape_, out, gradient, deltas_.data());
      avx512::attend_backward(shape_,
                              {.queries = query_rows.data(),
                               .query_tokens = query_tokens.data(),
                               .key_channels = keys.key_channels.data(),
                               .key_tokens = keys.key_tokens.data(),
                               .value_channels = keys.value_channels.data(),
                               .gradients = gradient_rows.data(),
                               .gradient_tokens = gradient_tokens.data(),
                               .log_sums = log_sums,
                               .deltas = deltas_.data()},
                              query_gradients_.data(), key_gradients, value_gradients, scratch_.data());
      avx512::scatter_rows(shape_, query_gradients_.data(), angles_, dq);
    }
    static void finish(HeadShape shape, Angles angles, const float* key_gradients,
                       const float* value_gradients, Rows<uint16_t> dk, Rows<uint16_t> dv) {
      avx512::scatter_rows(shape, key_gradients, angles, dk);
      avx512::scatter_rows(shape, value_gradients, {}, dv);
    }

   private:
    HeadShape shape_;
    Angles angles_;
    std::vector<float> scratch_, deltas_, query_gradients_;
  };
};

}  // namespace isobath::kernels
