#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <isobath/core/error.hpp>
#include <isobath/evaluate/token_metrics.hpp>
#include <isobath/kernels/logits.hpp>

namespace isobath::evaluate {
namespace {

// Two [chunk, vocab] logits are what a rank holds at once: 25 MB in bf16 at 49 152 tokens of vocabulary.
constexpr int64_t kChunkTokens = 128;

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

std::vector<TokenMetrics> compare(const model::ModelConfig& config, const Prediction& original,
                                  const std::vector<Prediction>& quantized, const at::Tensor& tokens) {
  ISOBATH_CHECK(original.hidden.dim() == 3 && tokens.dim() == 2 &&
                    tokens.sizes() == original.hidden.sizes().slice(0, 2),
                "hidden [b, T, d_model] and tokens [b, T] expected");
  for (const Prediction& other : quantized)
    ISOBATH_CHECK(other.hidden.sizes() == original.hidden.sizes(),
                  "all models' hidden states must have one shape");
  const int64_t n_windows = tokens.size(0), n_predicted = tokens.size(1) - 1;
  ISOBATH_CHECK(n_predicted >= 1, "a window of {} token predicts nothing", tokens.size(1));
  const c10::NoGradGuard no_grad;
  const auto f32 = original.hidden.options().dtype(at::kFloat).requires_grad(false);
  std::vector<TokenMetrics> all(std::max<size_t>(1, quantized.size()));
  for (TokenMetrics& metrics : all) {
    metrics.nll_original = at::empty({n_windows, n_predicted}, f32);
    if (quantized.empty()) continue;
    metrics.nll_quantized = at::empty_like(metrics.nll_original);
    metrics.kl = at::empty_like(metrics.nll_original);
    metrics.same_top1 = at::empty({n_windows, n_predicted}, f32.dtype(at::kByte));
  }
  const at::Tensor labels = tokens.to(original.hidden.device(), at::kLong);
  for (int64_t window = 0; window < n_windows; ++window) {
    for (int64_t begin = 0; begin < n_predicted; begin += kChunkTokens) {
      const int64_t end = std::min(begin + kChunkTokens, n_predicted);
      const auto chunk_of = [&](const at::Tensor& values) { return values[window].slice(0, begin, end); };
      const auto logits_of = [&](const Prediction& one) {
        return model::head_logits(config, *one.head, chunk_of(one.hidden));
      };
      const at::Tensor next = labels[window].slice(0, begin + 1, end + 1), p = logits_of(original);
      if (quantized.empty()) chunk_of(all[0].nll_original).copy_(kernels::label_loss(p, next).nll);
      for (size_t i = 0; i < quantized.size(); ++i) {
        const kernels::Comparison found = kernels::compare_logits(p, logits_of(quantized[i]), next);
        chunk_of(all[i].nll_original).copy_(found.nll_p);
        chunk_of(all[i].nll_quantized).copy_(found.nll_q);
        chunk_of(all[i].kl).copy_(found.kl);
        chunk_of(all[i].same_top1).copy_(found.same_top1);
      }
    }
  }
  for (const TokenMetrics& metrics : all) {
    require_finite(metrics.nll_original, "loss of the original model");
    require_finite(metrics.nll_quantized, "loss of the quantized model");
    require_finite(metrics.kl, "divergence of the quantized model");
  }
  return all;
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
