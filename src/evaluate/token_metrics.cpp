#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <isobath/core/error.hpp>
#include <isobath/evaluate/token_metrics.hpp>

namespace isobath::evaluate {
namespace {

// Two [chunk, vocab] f32 log-probabilities are what a rank holds at once: 50 MB at 49 152 tokens of
// vocabulary.
constexpr int64_t kChunkTokens = 128;

/// [c, d_model] hidden states -> [c, vocab] f32 log-probabilities.
at::Tensor log_probabilities(const model::ModelConfig& config, const model::HeadWeights& head,
                             const at::Tensor& hidden) {
  return at::log_softmax(model::head_logits(config, head, hidden), -1);
}

at::Tensor negative_log_likelihood(const at::Tensor& log_probabilities, const at::Tensor& labels) {
  return log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).neg();
}

void require_finite(const at::Tensor& values, const char* what) {
  if (!values.defined() || std::isfinite(values.sum().item<float>())) return;
  const at::Tensor bad = values.isfinite().logical_not().nonzero();
  ISOBATH_CHECK(bad.size(0) > 0, "the sum of finite {} overflows", what);
  fail<NumericError>(
      "evaluation: expected a finite {}, found {} at row {} of the batch, token {}; check the weights of "
      "that model",
      what, values[bad[0][0]][bad[0][1]].item<double>(), bad[0][0].item<int64_t>(),
      bad[0][1].item<int64_t>());
}

double mean_in_order(const std::vector<at::Tensor>& parts, int64_t n) {
  double sum = 0;
  for (const at::Tensor& part : parts) sum += part.to(at::kDouble).sum().item<double>();
  return sum / static_cast<double>(n);
}

}  // namespace

TokenMetrics compare(const model::ModelConfig& config, const model::HeadWeights& original_head,
                     const at::Tensor& hidden_original, const model::HeadWeights& quantized_head,
                     const at::Tensor& hidden_quantized, const at::Tensor& tokens) {
  ISOBATH_CHECK(hidden_original.dim() == 3 && tokens.dim() == 2 &&
                    tokens.sizes() == hidden_original.sizes().slice(0, 2),
                "hidden [b, T, d_model] and tokens [b, T] expected");
  const bool has_quantized = hidden_quantized.defined();
  ISOBATH_CHECK(!has_quantized || hidden_quantized.sizes() == hidden_original.sizes(),
                "both models' hidden states must have one shape");
  const int64_t n_windows = tokens.size(0), n_predicted = tokens.size(1) - 1;
  ISOBATH_CHECK(n_predicted >= 1, "a window of {} token predicts nothing", tokens.size(1));
  const c10::NoGradGuard no_grad;
  const auto f32 = hidden_original.options().dtype(at::kFloat).requires_grad(false);
  TokenMetrics metrics;
  metrics.nll_original = at::empty({n_windows, n_predicted}, f32);
  if (has_quantized) {
    metrics.nll_quantized = at::empty_like(metrics.nll_original);
    metrics.kl = at::empty_like(metrics.nll_original);
    metrics.same_top1 = at::empty({n_windows, n_predicted}, f32.dtype(at::kByte));
  }
  const at::Tensor labels = tokens.to(hidden_original.device(), at::kLong);
  for (int64_t window = 0; window < n_windows; ++window) {
    for (int64_t begin = 0; begin < n_predicted; begin += kChunkTokens) {
      const int64_t end = std::min(begin + kChunkTokens, n_predicted);
      const auto chunk_of = [&](const at::Tensor& values) { return values[window].slice(0, begin, end); };
      const at::Tensor next = labels[window].slice(0, begin + 1, end + 1);
      const at::Tensor original = log_probabilities(config, original_head, chunk_of(hidden_original));
      chunk_of(metrics.nll_original).copy_(negative_log_likelihood(original, next));
      if (!has_quantized) continue;
      const at::Tensor quantized = log_probabilities(config, quantized_head, chunk_of(hidden_quantized));
      chunk_of(metrics.nll_quantized).copy_(negative_log_likelihood(quantized, next));
      chunk_of(metrics.same_top1).copy_(original.argmax(1) == quantized.argmax(1));
      chunk_of(metrics.kl).copy_(original.exp().mul_(original - quantized).sum(1));
    }
  }
  require_finite(metrics.nll_original, "loss of the original model");
  require_finite(metrics.nll_quantized, "loss of the quantized model");
  require_finite(metrics.kl, "divergence of the quantized model");
  return metrics;
}

Summary summarise(const std::vector<TokenMetrics>& windows) {
  ISOBATH_CHECK(!windows.empty(), "nothing to summarise");
  Summary summary;
  summary.has_quantized = windows.front().nll_quantized.defined();
  std::vector<at::Tensor> nll_original, nll_quantized, kl, same_top1;
  for (const TokenMetrics& window : windows) {
    ISOBATH_CHECK(window.nll_quantized.defined() == summary.has_quantized,
                  "some windows lack the quantized model");
    summary.n_tokens += window.nll_original.numel();
    nll_original.push_back(window.nll_original);
    if (!summary.has_quantized) continue;
    nll_quantized.push_back(window.nll_quantized);
    kl.push_back(window.kl.flatten());
    same_top1.push_back(window.same_top1);
  }
  summary.perplexity_original = std::exp(mean_in_order(nll_original, summary.n_tokens));
  summary.perplexity = summary.perplexity_original;
  if (!summary.has_quantized) return summary;
  summary.perplexity = std::exp(mean_in_order(nll_quantized, summary.n_tokens));
  summary.kl_mean = mean_in_order(kl, summary.n_tokens);
  const at::Tensor all_kl = at::cat(kl).to(at::kDouble);
  summary.kl_median = at::quantile(all_kl, 0.5).item<double>();
  summary.kl_p99 = at::quantile(all_kl, 0.99).item<double>();
  summary.top1_agreement = mean_in_order(same_top1, summary.n_tokens);
  return summary;
}

}  // namespace isobath::evaluate
