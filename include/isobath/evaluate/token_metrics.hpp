#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <isobath/model/head.hpp>
#include <vector>

namespace isobath::evaluate {

/// Per-token results of some windows; small enough to gather (12 bytes a token).
struct TokenMetrics {
  at::Tensor nll_original;   ///< [b, T−1] f32, nats
  at::Tensor nll_quantized;  ///< [b, T−1] f32; undefined when only one model is evaluated
  at::Tensor kl;             ///< [b, T−1] f32: KL(original ‖ quantized), nats
  at::Tensor same_top1;      ///< [b, T−1] u8
};

/// A model's last hidden states [b, T, d_model] and its head.
struct Prediction {
  const model::HeadWeights* head = nullptr;
  at::Tensor hidden;
};

/// Compares models' predictions with the original's from their last hidden states, in token chunks, without
/// storing logits [b, T, vocab]; one result a compared model, or one with nll_original alone when there is
/// none. tokens [b, T] i32. Local. Chunks never cross a window, so a window's results do not depend on the
/// others.
///
/// Memory   two [128, vocab] in the hidden states' dtype (f32 copies of them off the fast path).
///
/// Throws   NumericError naming model, row of the batch and token where a loss is not finite.
[[nodiscard]] std::vector<TokenMetrics> compare(const model::ModelConfig& config, const Prediction& original,
                                                const std::vector<Prediction>& quantized,
                                                const at::Tensor& tokens);

struct Summary {
  int64_t n_tokens = 0;
  /// exp of the mean nll; equal when only one model is evaluated.
  double perplexity_original = 0, perplexity = 0;
  double kl_mean = 0, kl_median = 0, kl_p99 = 0;  ///< nats per token
  double top1_agreement = 0;                      ///< share in [0, 1]
  bool has_quantized = false;
};

/// From the metrics of all windows in window order; f64 sums in that order; quantiles as numpy.quantile's
/// linear ones. Precondition: at least one window; all of them with a quantized model or none.
[[nodiscard]] Summary summarise(const std::vector<TokenMetrics>& windows);

}  // namespace isobath::evaluate
