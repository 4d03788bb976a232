#pragma once
#include <ATen/core/Tensor.h>

/// Softmax over a vocabulary without copies of the logits. bf16 on a CPU with AVX-512 BF16 and f32 on one
/// with AVX2 read each logit twice or three times and sum in f64 over f32 sums of some thousand; elsewhere
/// the same comes from ATen operations in f32. Local.
namespace isobath::kernels {

struct LabelLoss {
  at::Tensor log_sums;       ///< [n] f32: log Σ exp(logit)
  at::Tensor nll;            ///< [n] f32: log_sums − logit(label) = −log p(label), nats
  at::Tensor probabilities;  ///< [n, vocab] in the logits' dtype
};
/// logits [n, vocab] any float dtype; labels [n] i64 in [0, vocab).
[[nodiscard]] LabelLoss label_loss(const at::Tensor& logits, const at::Tensor& labels);

/// Two models' predictions of the same tokens.
struct Comparison {
  at::Tensor nll_p, nll_q;  ///< [n] f32, nats
  at::Tensor kl;            ///< [n] f32: Σ p log(p / q), nats
  at::Tensor same_top1;     ///< [n] u8: the first largest logits stand at one place
};
/// p and q: logits [n, vocab] of one dtype; labels [n] i64 in [0, vocab). Not finite where a row of logits is
/// not.
[[nodiscard]] Comparison compare_logits(const at::Tensor& p, const at::Tensor& q, const at::Tensor& labels);

}  // namespace isobath::kernels
