#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/kernels/attention.hpp>
#include <isobath/kernels/cpu.hpp>
#include <vector>

#include "avx512/attention.hpp"

namespace isobath::kernels {
namespace {

/// A contiguous [b, T, n·head_dim] bf16 tensor seen head by head.
struct Heads {
  Heads(const at::Tensor& tensor, int64_t n_heads, int64_t head_dim)
      : whole(tensor.contiguous()), n(n_heads), d(head_dim) {}
  [[nodiscard]] avx512::Rows rows(int64_t sequence, int64_t head) const {
    const auto* data = reinterpret_cast<const uint16_t*>(whole.const_data_ptr<at::BFloat16>());
    return {data + sequence * whole.size(1) * n * d + head * d, n * d};
  }
  [[nodiscard]] avx512::MutableRows mutable_rows(int64_t sequence, int64_t head) const {
    auto* data = reinterpret_cast<uint16_t*>(whole.mutable_data_ptr<at::BFloat16>());
    return {data + sequence * whole.size(1) * n * d + head * d, n * d};
  }
  at::Tensor whole;
  int64_t n, d;
};

struct Problem {
  avx512::HeadShape shape;
  avx512::Angles angles;
  int64_t n_sequences, n_heads, n_kv_heads, padded;
  at::Tensor cos, sin;  // keep what `angles` points to
};

Problem problem_of(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  ISOBATH_CHECK(has_attention(spec, q),
                "attention needs AVX-512 BF16, bf16 inputs and a head_dim that 32 divides");
  ISOBATH_CHECK(q.dim() == 3 && q.size(2) == spec.n_heads * spec.head_dim && k.sizes() == v.sizes() &&
                    k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                    k.size(2) == spec.n_kv_heads * spec.head_dim && spec.n_heads % spec.n_kv_heads == 0,
                "attention of {} heads, {} kv heads, head_dim {}: q, k or v do not fit", spec.n_heads,
                spec.n_kv_heads, spec.head_dim);
  ISOBATH_CHECK(
      !spec.cos.defined() || (spec.cos.size(0) >= q.size(1) && spec.cos.scalar_type() == at::kFloat),
      "rotary tables for {} tokens", q.size(1));
  Problem problem{.shape = {q.size(1), spec.head_dim, 1.0F / std::sqrt(static_cast<float>(spec.head_dim))},
                  .angles = {nullptr, nullptr},
                  .n_sequences = q.size(0),
                  .n_heads = spec.n_heads,
                  .n_kv_heads = spec.n_kv_heads,
                  .padded = avx512::padded_length(q.size(1)),
                  .cos = spec.cos,
                  .sin = spec.sin};
  if (spec.cos.defined()) {
    problem.cos = spec.cos.contiguous();
    problem.sin = spec.sin.contiguous();
    problem.angles = {problem.cos.const_data_ptr<float>(), problem.sin.const_data_ptr<float>()};
  }
  return problem;
}

std::vector<uint16_t> gathered(const Problem& problem, avx512::Rows rows, bool rotate) {
  std::vector<uint16_t> to(problem.padded * problem.shape.head_dim);
  avx512::gather_rows(problem.shape, rows, rotate ? problem.angles : avx512::Angles{nullptr, nullptr},
                      to.data());
  return to;
}

using Pairs = std::vector<uint32_t>;

Pairs channel_pairs(const Problem& problem, const std::vector<uint16_t>& rows) {
  Pairs to(rows.size() / 2);
  avx512::pair_channels(problem.shape, rows.data(), to.data());
  return to;
}

Pairs token_pairs(const Problem& problem, const std::vector<uint16_t>& rows) {
  Pairs to(rows.size() / 2);
  avx512::pair_tokens(problem.shape, rows.data(), to.data());
  return to;
}

}  // namespace

bool has_attention(const AttentionSpec& spec, const at::Tensor& q) {
  return has_avx512_bf16() && q.is_cpu() && q.scalar_type() == at::kBFloat16 && spec.head_dim % 32 == 0;
}

AttentionOutput attention(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v) {
  const Problem problem = problem_of(spec, q, k, v);
  const int64_t n_kv = problem.n_sequences * problem.n_kv_heads, group = problem.n_heads / problem.n_kv_heads;
  const Heads queries(q, spec.n_heads, spec.head_dim), keys(k, spec.n_kv_heads, spec.head_dim),
      values(v, spec.n_kv_heads, spec.head_dim);
  AttentionOutput result{
      at::empty(q.sizes(), q.options()),
      at::empty({problem.n_sequences, problem.n_heads, q.size(1)}, q.options().dtype(at::kFloat))};
  const Heads outputs(result.out, spec.n_heads, spec.head_dim);
  auto* log_sums = result.log_sums.mutable_data_ptr<float>();

  std::vector<Pairs> key_pairs(n_kv), value_pairs(n_kv);
  at::parallel_for(0, n_kv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / problem.n_kv_heads, head = i % problem.n_kv_heads;
      key_pairs[i] = channel_pairs(problem, gathered(problem, keys.rows(sequence, head), true));
      value_pairs[i] = token_pairs(problem, gathered(problem, values.rows(sequence, head), false));
    }
  });
  at::parallel_for(0, problem.n_sequences * problem.n_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(avx512::kQueryTile * problem.padded);
    std::vector<uint16_t> scratch_bf16(scratch.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / problem.n_heads, head = i % problem.n_heads;
      const int64_t kv = sequence * problem.n_kv_heads + head / group;
      const std::vector<uint16_t> rotated = gathered(problem, queries.rows(sequence, head), true);
      avx512::attend_queries(problem.shape, rotated.data(), key_pairs[kv].data(), value_pairs[kv].data(),
                             outputs.mutable_rows(sequence, head), log_sums + i * q.size(1), scratch.data(),
                             scratch_bf16.data());
    }
  });
  return result;
}

AttentionGradients attention_backward(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v, const AttentionOutput& forward,
                                      const at::Tensor& gradient) {
  const Problem problem = problem_of(spec, q, k, v);
  ISOBATH_CHECK(gradient.sizes() == q.sizes() && gradient.scalar_type() == at::kBFloat16,
                "the gradient of attention must be as its output");
  const int64_t group = problem.n_heads / problem.n_kv_heads, n_floats = problem.padded * spec.head_dim;
  const Heads queries(q, spec.n_heads, spec.head_dim), keys(k, spec.n_kv_heads, spec.head_dim),
      values(v, spec.n_kv_heads, spec.head_dim), outputs(forward.out, spec.n_heads, spec.head_dim),
      gradients(gradient, spec.n_heads, spec.head_dim);
  AttentionGradients result{at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()),
                            at::empty(v.sizes(), v.options())};
  const Heads dq(result.q, spec.n_heads, spec.head_dim), dk(result.k, spec.n_kv_heads, spec.head_dim),
      dv(result.v, spec.n_kv_heads, spec.head_dim);
  const float* log_sums = forward.log_sums.const_data_ptr<float>();

  // One task a kv head: its gradients sum over its query heads in their order.
  at::parallel_for(0, problem.n_sequences * problem.n_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(avx512::backward_scratch(problem.shape)), deltas(problem.padded),
        query_gradients(n_floats), key_gradients(n_floats), value_gradients(n_floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / problem.n_kv_heads, kv_head = i % problem.n_kv_heads;
      const std::vector<uint16_t> key_rows = gathered(problem, keys.rows(sequence, kv_head), true);
      const Pairs key_channels = channel_pairs(problem, key_rows),
                  key_tokens = token_pairs(problem, key_rows);
      const Pairs value_channels =
          channel_pairs(problem, gathered(problem, values.rows(sequence, kv_head), false));
      std::fill(key_gradients.begin(), key_gradients.end(), 0.0F);
      std::fill(value_gradients.begin(), value_gradients.end(), 0.0F);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const std::vector<uint16_t> query_rows = gathered(problem, queries.rows(sequence, head), true);
        const std::vector<uint16_t> gradient_rows = gathered(problem, gradients.rows(sequence, head), false);
        const Pairs query_tokens = token_pairs(problem, query_rows),
                    gradient_tokens = token_pairs(problem, gradient_rows);
        avx512::dot_rows(problem.shape, outputs.rows(sequence, head), gradients.rows(sequence, head),
                         deltas.data());
        avx512::attend_backward(problem.shape,
                                {.queries = query_rows.data(),
                                 .query_tokens = query_tokens.data(),
                                 .key_channels = key_channels.data(),
                                 .key_tokens = key_tokens.data(),
                                 .value_channels = value_channels.data(),
                                 .gradients = gradient_rows.data(),
                                 .gradient_tokens = gradient_tokens.data(),
                                 .log_sums = log_sums + (sequence * problem.n_heads + head) * q.size(1),
                                 .deltas = deltas.data()},
                                query_gradients.data(), key_gradients.data(), value_gradients.data(),
                                scratch.data());
        avx512::scatter_rows(problem.shape, query_gradients.data(), problem.angles,
                             dq.mutable_rows(sequence, head));
      }
      avx512::scatter_rows(problem.shape, key_gradients.data(), problem.angles,
                           dk.mutable_rows(sequence, kv_head));
      avx512::scatter_rows(problem.shape, value_gradients.data(), {nullptr, nullptr},
                           dv.mutable_rows(sequence, kv_head));
    }
  });
  return result;
}

}  // namespace isobath::kernels
