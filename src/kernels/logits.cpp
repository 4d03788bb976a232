#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/logits.hpp>

#include "logits_rows.hpp"

namespace isobath::kernels {
namespace {

bool is_fast(const at::Tensor& logits) {
  return logits.is_cpu() && implementation_of(logits.scalar_type()) != "aten";
}

/// [n, vocab] contiguous logits seen as the rows of a kernel.
template <class Value, class Scalar>
struct LogitsOf {
  explicit LogitsOf(const at::Tensor& logits) : whole(logits.contiguous()), vocab(logits.size(1)) {}
  [[nodiscard]] const Value* row(int64_t i) const {
    return reinterpret_cast<const Value*>(whole.const_data_ptr<Scalar>()) + i * vocab;
  }
  [[nodiscard]] float at(int64_t i, int64_t token) const {
    return static_cast<float>(whole.const_data_ptr<Scalar>()[i * vocab + token]);
  }
  at::Tensor whole;
  int64_t vocab;
};

void check(const at::Tensor& logits, const at::Tensor& labels) {
  ISOBATH_CHECK(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0) &&
                    labels.scalar_type() == at::kLong,
                "logits [n, vocab] and labels [n] i64 expected");
}

at::Tensor nll_of(const at::Tensor& log_probabilities, const at::Tensor& labels) {
  return log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).neg();
}

template <class Value, class Scalar>
LabelLoss label_loss_of(const at::Tensor& logits, const at::Tensor& labels) {
  using Rows = LogitsRows<Value>;
  const LogitsOf<Value, Scalar> from(logits);
  const int64_t n = logits.size(0), vocab = logits.size(1);
  LabelLoss result{at::empty({n}, at::kFloat), at::empty({n}, at::kFloat), at::empty_like(from.whole)};
  auto* log_sums = result.log_sums.mutable_data_ptr<float>();
  auto* nll = result.nll.mutable_data_ptr<float>();
  auto* to = reinterpret_cast<Value*>(result.probabilities.mutable_data_ptr<Scalar>());
  const auto* label = labels.const_data_ptr<int64_t>();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float peak = Rows::largest(from.row(i), vocab).value;
      const double sum = Rows::softmax(from.row(i), vocab, peak, to + i * vocab);
      log_sums[i] = static_cast<float>(std::log(sum) + peak);
      nll[i] = static_cast<float>(std::log(sum) - (from.at(i, label[i]) - peak));
    }
  });
  return result;
}

template <class Value, class Scalar>
Comparison compare_logits_of(const at::Tensor& p, const at::Tensor& q, const at::Tensor& labels) {
  using Rows = LogitsRows<Value>;
  const LogitsOf<Value, Scalar> a(p), b(q);
  const int64_t n = p.size(0), vocab = p.size(1);
  const auto f32 = at::TensorOptions(at::kFloat);
  Comparison result{at::empty({n}, f32), at::empty({n}, f32), at::empty({n}, f32), at::empty({n}, at::kByte)};
  auto* nll_p = result.nll_p.mutable_data_ptr<float>();
  auto* nll_q = result.nll_q.mutable_data_ptr<float>();
  auto* kl = result.kl.mutable_data_ptr<float>();
  auto* same = result.same_top1.mutable_data_ptr<uint8_t>();
  const auto* label = labels.const_data_ptr<int64_t>();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto peak_p = Rows::largest(a.row(i), vocab), peak_q = Rows::largest(b.row(i), vocab);
      const auto sums = Rows::divergence(a.row(i), b.row(i), vocab, peak_p.value, peak_q.value);
      const double log_p = std::log(sums.sum_p), log_q = std::log(sums.sum_q);
      nll_p[i] = static_cast<float>(log_p - (a.at(i, label[i]) - peak_p.value));
      nll_q[i] = static_cast<float>(log_q - (b.at(i, label[i]) - peak_q.value));
      kl[i] = static_cast<float>(sums.moment / sums.sum_p - (log_p - log_q));
      same[i] = peak_p.index == peak_q.index ? 1 : 0;
    }
  });
  return result;
}

}  // namespace

LabelLoss label_loss(const at::Tensor& logits, const at::Tensor& labels) {
  check(logits, labels);
  if (!is_fast(logits)) {
    const at::Tensor wide = logits.to(at::kFloat), log_sums = at::logsumexp(wide, 1);
    return {log_sums, log_sums - wide.gather(1, labels.unsqueeze(1)).squeeze(1),
            at::exp(wide - log_sums.unsqueeze(1)).to(logits.scalar_type())};
  }
  const at::Tensor places = labels.contiguous();
  return logits.scalar_type() == at::kBFloat16 ? label_loss_of<uint16_t, at::BFloat16>(logits, places)
                                               : label_loss_of<float, float>(logits, places);
}

Comparison compare_logits(const at::Tensor& p, const at::Tensor& q, const at::Tensor& labels) {
  check(p, labels);
  ISOBATH_CHECK(p.sizes() == q.sizes() && p.scalar_type() == q.scalar_type(),
                "logits of two shapes or dtypes");
  if (!is_fast(p)) {
    const at::Tensor log_p = at::log_softmax(p.to(at::kFloat), -1),
                     log_q = at::log_softmax(q.to(at::kFloat), -1);
    return {nll_of(log_p, labels), nll_of(log_q, labels), log_p.exp().mul_(log_p - log_q).sum(1),
            (p.argmax(1) == q.argmax(1)).to(at::kByte)};
  }
  const at::Tensor places = labels.contiguous();
  return p.scalar_type() == at::kBFloat16 ? compare_logits_of<uint16_t, at::BFloat16>(p, q, places)
                                          : compare_logits_of<float, float>(p, q, places);
}

}  // namespace isobath::kernels
