#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <isobath/model/checkpoint_reader.hpp>

namespace isobath::model {

enum class LossKind { nll, fisher, kl };

struct LossSpec {
  LossKind kind = LossKind::nll;
  int64_t n_samples = 1;  ///< fisher: label draws per token; nll, kl: 1
  uint64_t seed = 0;
};

struct LossResult {
  double nll_sum = 0;  ///< Σ over predicted tokens of −ln p(data label), in nats, whatever the kind
  double kl_sum = 0;   ///< kl: Σ of KL(original ‖ model) over the same tokens, nats; else 0
  int64_t n_predicted = 0;
  at::Tensor gradient;  ///< [n_samples, b, T, d_model], dtype of hidden: ∂L/∂hidden, L the *sum* over tokens
};

/// tokens [b, T] i32 -> [b, T, d_model].
[[nodiscard]] at::Tensor embed(const at::Tensor& embedding, const at::Tensor& tokens);

/// Final norm and output projection. hidden [..., d_model] -> logits [..., vocab] in hidden's
/// dtype.
[[nodiscard]] at::Tensor head_logits(const ModelConfig& config, const HeadWeights& head,
                                     const at::Tensor& hidden);

/// Loss of one microbatch and its gradient at the last block's output. Position t predicts token t+1 for t <
/// length−1. nll: labels of the data. fisher: labels drawn from the model by inverse transform with
/// CounterRandom(seed, fisher_label).uniform(sequence, t, sample). kl: KL(original ‖ model), whose gradient
/// at the logits is p − p̃; zero where the model is the original. Works in token chunks: logits [chunk, vocab]
/// only, with kl those of both models.
///
/// original: the original model's last hidden states, of hidden's shape; kl only.
/// hidden [b, T, d_model]; tokens [b, T] i32; lengths [b] i32; `sequences`: their global indices (key of the
/// random numbers). Throws NumericError naming the first sequence and token with a non-finite loss.
[[nodiscard]] LossResult loss_and_gradient(const ModelConfig& config, const HeadWeights& head,
                                           const at::Tensor& hidden, const at::Tensor& tokens,
                                           const at::Tensor& lengths, Range sequences, const LossSpec& loss,
                                           const at::Tensor& original = {});

}  // namespace isobath::model
