#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/logits.hpp>

#include "avx512/logits.hpp"

namespace isobath::kernels {
namespace {

bool is_fast(const at::Tensor& logits) {
  return has_avx512_bf16() && logits.is_cpu() && logits.scalar_type() == at::kBFloat16;
}

const uint16_t* row_of(const at::Tensor& logits, int64_t row) {
  return reinterpret_cast<const uint16_t*>(logits.const_data_ptr<at::BFloat16>()) + row * logits.size(1);
}

void check(const at::Tensor& logits, const at::Tensor& labels) {
  ISOBATH_CHECK(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0) &&
                    labels.scalar_type() == at::kLong,
                "logits [n, vocab] and labels [n] i64 expected");
}

at::Tensor nll_of(const at::Tensor& log_probabilities, const at::Tensor& labels) {
  return log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).neg();
}

}  // namespace

LabelLoss label_loss(const at::Tensor& logits, const at::Tensor& labels) {
  check(logits, labels);
  if (!is_fast(logits)) {
    const at::Tensor wide = logits.to(at::kFloat), log_sums = at::logsumexp(wide, 1);
    return {log_sums, log_sums - wide.gather(1, labels.unsqueeze(1)).squeeze(1),
            at::exp(wide - log_sums.unsqueeze(1)).to(logits.scalar_type())};
  }
  const at::Tensor from = logits.contiguous(), places = labels.contiguous();
  const int64_t n = from.size(0), vocab = from.size(1);
  LabelLoss result{at::empty({n}, at::kFloat), at::empty({n}, at::kFloat), at::empty_like(from)};
  auto* log_sums = result.log_sums.mutable_data_ptr<float>();
  auto* nll = result.nll.mutable_data_ptr<float>();
  auto* to = reinterpret_cast<uint16_t*>(result.probabilities.mutable_data_ptr<at::BFloat16>());
  const auto* label = places.const_data_ptr<int64_t>();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint16_t* row = row_of(from, i);
      const avx512::Peak peak = avx512::largest(row, vocab);
      const float sum = avx512::softmax_row(row, vocab, peak.value, to + i * vocab);
      log_sums[i] = std::log(sum) + peak.value;
      nll[i] = log_sums[i] - static_cast<float>(from.const_data_ptr<at::BFloat16>()[i * vocab + label[i]]);
    }
  });
  return result;
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
  const at::Tensor a = p.contiguous(), b = q.contiguous(), places = labels.contiguous();
  const int64_t n = a.size(0), vocab = a.size(1);
  const auto f32 = at::TensorOptions(at::kFloat);
  Comparison result{at::empty({n}, f32), at::empty({n}, f32), at::empty({n}, f32), at::empty({n}, at::kByte)};
  auto* nll_p = result.nll_p.mutable_data_ptr<float>();
  auto* nll_q = result.nll_q.mutable_data_ptr<float>();
  auto* kl = result.kl.mutable_data_ptr<float>();
  auto* same = result.same_top1.mutable_data_ptr<uint8_t>();
  const auto* label = places.const_data_ptr<int64_t>();
  const auto at_label = [&](const at::Tensor& logits, int64_t i) {
    return static_cast<float>(logits.const_data_ptr<at::BFloat16>()[i * vocab + label[i]]);
  };
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const avx512::Peak peak_p = avx512::largest(row_of(a, i), vocab),
                         peak_q = avx512::largest(row_of(b, i), vocab);
      const avx512::Divergence sums =
          avx512::divergence_row(row_of(a, i), row_of(b, i), vocab, peak_p.value, peak_q.value);
      nll_p[i] = std::log(sums.sum_p) - (at_label(a, i) - peak_p.value);
      nll_q[i] = std::log(sums.sum_q) - (at_label(b, i) - peak_q.value);
      kl[i] = sums.moment / sums.sum_p - (std::log(sums.sum_p) - std::log(sums.sum_q));
      same[i] = peak_p.index == peak_q.index ? 1 : 0;
    }
  });
  return result;
}

}  // namespace isobath::kernels
