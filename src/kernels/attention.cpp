#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/kernels/attention.hpp>
#include <isobath/kernels/cpu.hpp>
#include <memory>
#include <vector>

#include "attention_bf16.hpp"
#include "attention_f32.hpp"

namespace isobath::kernels {
namespace {

/// A contiguous [b, T, n·head_dim] tensor seen head by head.
template <class Kernel>
struct Heads {
  using Value = typename Kernel::Value;
  Heads(const at::Tensor& tensor, int64_t n_heads, int64_t head_dim)
      : whole(tensor.contiguous()), n(n_heads), d(head_dim) {}
  [[nodiscard]] Rows<const Value> rows(int64_t sequence, int64_t head) const {
    return {reinterpret_cast<const Value*>(whole.const_data_ptr<typename Kernel::Scalar>()) +
                offset(sequence, head),
            n * d};
  }
  [[nodiscard]] Rows<Value> mutable_rows(int64_t sequence, int64_t head) const {
    return {
        reinterpret_cast<Value*>(whole.mutable_data_ptr<typename Kernel::Scalar>()) + offset(sequence, head),
        n * d};
  }
  [[nodiscard]] int64_t offset(int64_t sequence, int64_t head) const {
    return sequence * whole.size(1) * n * d + head * d;
  }
  at::Tensor whole;
  int64_t n, d;
};

struct Problem {
  HeadShape shape;
  Angles angles;
  int64_t n_sequences, n_heads, n_kv_heads;
  at::Tensor cos, sin;  // keep what `angles` points to
};

Problem problem_of(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  ISOBATH_CHECK(has_attention(spec, q), "this machine has no attention kernel for {} and head_dim {}",
                c10::toString(q.scalar_type()), spec.head_dim);
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
                  .cos = spec.cos,
                  .sin = spec.sin};
  if (spec.cos.defined()) {
    problem.cos = spec.cos.contiguous();
    problem.sin = spec.sin.contiguous();
    problem.angles = {problem.cos.const_data_ptr<float>(), problem.sin.const_data_ptr<float>()};
  }
  return problem;
}

template <class Kernel>
AttentionOutput forward_as(const Problem& problem, const AttentionSpec& spec, const at::Tensor& q,
                           const at::Tensor& k, const at::Tensor& v) {
  const int64_t n_kv = problem.n_sequences * problem.n_kv_heads, group = problem.n_heads / problem.n_kv_heads;
  const Heads<Kernel> queries(q, spec.n_heads, spec.head_dim), keys(k, spec.n_kv_heads, spec.head_dim),
      values(v, spec.n_kv_heads, spec.head_dim);
  AttentionOutput result{
      at::empty(q.sizes(), q.options()),
      at::empty({problem.n_sequences, problem.n_heads, q.size(1)}, q.options().dtype(at::kFloat))};
  const Heads<Kernel> outputs(result.out, spec.n_heads, spec.head_dim);
  auto* log_sums = result.log_sums.mutable_data_ptr<float>();

  std::vector<std::unique_ptr<const typename Kernel::Keys>> prepared(n_kv);
  at::parallel_for(0, n_kv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / problem.n_kv_heads, head = i % problem.n_kv_heads;
      prepared[i] = std::make_unique<const typename Kernel::Keys>(
          problem.shape, problem.angles, keys.rows(sequence, head), values.rows(sequence, head));
    }
  });
  at::parallel_for(0, problem.n_sequences * problem.n_heads, 1, [&](int64_t begin, int64_t end) {
    typename Kernel::Forward forward(problem.shape, problem.angles);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / problem.n_heads, head = i % problem.n_heads;
      forward.run(queries.rows(sequence, head), *prepared[sequence * problem.n_kv_heads + head / group],
                  outputs.mutable_rows(sequence, head), log_sums + i * q.size(1));
    }
  });
  return result;
}

template <class Kernel>
AttentionGradients backward_as(const Problem& problem, const AttentionSpec& spec, const at::Tensor& q,
                               const at::Tensor& k, const at::Tensor& v, const AttentionOutput& forward,
                               const at::Tensor& gradient) {
  const int64_t group = problem.n_heads / problem.n_kv_heads;
  const Heads<Kernel> queries(q, spec.n_heads, spec.head_dim), keys(k, spec.n_kv_heads, spec.head_dim),
      values(v, spec.n_kv_heads, spec.head_dim), outputs(forward.out, spec.n_heads, spec.head_dim),
      gradients(gradient, spec.n_heads, spec.head_dim);
  AttentionGradients result{at::empty(q.sizes(), q.options()), at::empty(k.sizes(), k.options()),
                            at::empty(v.sizes(), v.options())};
  const Heads<Kernel> dq(result.q, spec.n_heads, spec.head_dim), dk(result.k, spec.n_kv_heads, spec.head_dim),
      dv(result.v, spec.n_kv_heads, spec.head_dim);
  const float* log_sums = forward.log_sums.const_data_ptr<float>();

  // One task a query head, more than there are kv heads; a kv head's gradients are the sum of its query
  // heads' in their order.
  const HeadShape shape = problem.shape;
  const int64_t n_gradients = Kernel::Backward::n_gradients(shape);
  std::vector<std::unique_ptr<const typename Kernel::BackwardKeys>> prepared(problem.n_kv_heads);
  std::vector<std::vector<float>> shares(2 * problem.n_heads);  // of keys, of values; head by head
  for (int64_t sequence = 0; sequence < problem.n_sequences; ++sequence) {
    at::parallel_for(0, problem.n_kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head)
        prepared[head] = std::make_unique<const typename Kernel::BackwardKeys>(
            shape, problem.angles, keys.rows(sequence, head), values.rows(sequence, head));
    });
    at::parallel_for(0, problem.n_heads, 1, [&](int64_t begin, int64_t end) {
      typename Kernel::Backward backward(shape, problem.angles);
      for (int64_t head = begin; head < end; ++head) {
        std::vector<float>&of_keys = shares[2 * head], &of_values = shares[2 * head + 1];
        of_keys.assign(n_gradients, 0.0F);
        of_values.assign(n_gradients, 0.0F);
        backward.add(queries.rows(sequence, head), *prepared[head / group], outputs.rows(sequence, head),
                     gradients.rows(sequence, head),
                     log_sums + (sequence * problem.n_heads + head) * q.size(1),
                     dq.mutable_rows(sequence, head), of_keys.data(), of_values.data());
      }
    });
    at::parallel_for(0, problem.n_kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t kv_head = begin; kv_head < end; ++kv_head) {
        const int64_t first = kv_head * group;
        for (int64_t head = first + 1; head < first + group; ++head)
          for (int64_t part = 0; part < 2; ++part) {
            float* const sum = shares[2 * first + part].data();
            const float* const share = shares[2 * head + part].data();
            for (int64_t i = 0; i < n_gradients; ++i) sum[i] += share[i];
          }
        Kernel::Backward::finish(shape, problem.angles, shares[2 * first].data(),
                                 shares[2 * first + 1].data(), dk.mutable_rows(sequence, kv_head),
                                 dv.mutable_rows(sequence, kv_head));
      }
    });
  }
  return result;
}

}  // namespace

bool has_attention(const AttentionSpec& spec, const at::Tensor& q) {
  const bool records = c10::GradMode::is_enabled() && q.requires_grad();
  if (!q.is_cpu() || records || implementation_of(q.scalar_type()) == "aten") return false;
  const int64_t divisor =
      q.scalar_type() == at::kBFloat16 ? Bf16Attention::kHeadDimDivisor : F32Attention::kHeadDimDivisor;
  return spec.head_dim % divisor == 0;
}

AttentionOutput attention(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k,
                          const at::Tensor& v) {
  const Problem problem = problem_of(spec, q, k, v);
  return q.scalar_type() == at::kBFloat16 ? forward_as<Bf16Attention>(problem, spec, q, k, v)
                                          : forward_as<F32Attention>(problem, spec, q, k, v);
}

AttentionGradients attention_backward(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k,
                                      const at::Tensor& v, const AttentionOutput& forward,
                                      const at::Tensor& gradient) {
  const Problem problem = problem_of(spec, q, k, v);
  ISOBATH_CHECK(gradient.sizes() == q.sizes() && gradient.scalar_type() == q.scalar_type(),
                "the gradient of attention must be as its output");
  return q.scalar_type() == at::kBFloat16
             ? backward_as<Bf16Attention>(problem, spec, q, k, v, forward, gradient)
             : backward_as<F32Attention>(problem, spec, q, k, v, forward, gradient);
}

}  // namespace isobath::kernels
