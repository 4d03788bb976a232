#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <fmt/ranges.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/core/random.hpp>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/kernels/linear.hpp>
#include <isobath/kernels/logits.hpp>
#include <isobath/model/head.hpp>

namespace isobath::model {
namespace {

/// Tokens whose logits exist at once: [256, 128256] f32 is 125 MiB.
constexpr int64_t kChunkTokens = 256;

/// The predicted positions of one chunk of one sequence.
struct Chunk {
  int64_t row;          ///< of the microbatch
  int64_t sequence;     ///< global index
  int64_t first;        ///< first token
  int64_t n_tokens;     ///< rows of the chunk
  int64_t n_predicted;  ///< leading rows that predict a token; the others are padding or the sequence's last
                        ///< token
};

std::vector<Chunk> chunks_of(const at::Tensor& lengths, int64_t n_tokens, Range sequences) {
  // Chunks never cross a sequence and are cut at fixed places, so that a sequence's result depends on itself
  // alone.
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < lengths.size(0); ++row) {
    const int64_t n_predicted = lengths[row].item<int64_t>() - 1;
    ISOBATH_CHECK(n_predicted < n_tokens, "sequence {} has length {} in a microbatch of {} tokens",
                  sequences.begin + row, n_predicted + 1, n_tokens);
    for (int64_t first = 0; first < n_predicted; first += kChunkTokens) {
      chunks.push_back({row, sequences.begin + row, first, std::min(kChunkTokens, n_tokens - first),
                        std::min(kChunkTokens, n_predicted - first)});
    }
  }
  return chunks;
}

/// Σ nll over the predicted tokens of a chunk, in token order. nll [n_tokens] f32.
double sum_nll(const at::Tensor& nll, const Chunk& chunk) {
  const at::Tensor values = nll.to(at::kDouble).cpu();
  double sum = 0;
  for (int64_t t = 0; t < chunk.n_predicted; ++t) {
    const double value = values.const_data_ptr<double>()[t];
    if (!std::isfinite(value)) {
      fail<NumericError>(
          "non-finite loss ({}) in calibration sequence {} at token {}; the hidden states of the last block "
          "or the output projection overflowed in this dtype",
          value, chunk.sequence, chunk.first + t);
    }
    sum += value;
  }
  return sum;
}

/// Operations that ATen refuses where determinism was asked for are allowed while it lives.
class DeterminismNotAsked {
 public:
  DeterminismNotAsked() { at::globalContext().setDeterministicAlgorithms(false, /*warn_only=*/false); }
  ~DeterminismNotAsked() { at::globalContext().setDeterministicAlgorithms(was_asked_, was_warning_); }
  DeterminismNotAsked(const DeterminismNotAsked&) = delete;
  DeterminismNotAsked& operator=(const DeterminismNotAsked&) = delete;

 private:
  bool was_asked_ = at::globalContext().deterministicAlgorithms();
  bool was_warning_ = at::globalContext().deterministicAlgorithmsWarnOnly();
};

/// Labels drawn by inverse transform: the first whose cumulative probability exceeds u. [n_predicted,
/// n_samples] i64.
at::Tensor draw_labels(const at::Tensor& probabilities, const Chunk& chunk, const LossSpec& loss) {
  const CounterRandom random(loss.seed, RandomPurpose::fisher_label);
  at::Tensor uniform = at::empty({chunk.n_predicted, loss.n_samples}, at::kDouble);
  auto* value = uniform.mutable_data_ptr<double>();
  for (int64_t t = 0; t < chunk.n_predicted; ++t) {
    for (int64_t sample = 0; sample < loss.n_samples; ++sample) {
      *value++ = random.uniform(static_cast<uint64_t>(chunk.sequence), static_cast<uint32_t>(chunk.first + t),
                                static_cast<uint32_t>(sample));
    }
  }
  // A row is summed by one block in its order, on CUDA too, though ATen does not promise it.
  const DeterminismNotAsked unasked;
  // f64: an f32 running sum over 1e5 tokens is off by more than a rare token's probability.
  const at::Tensor cumulative = probabilities.narrow(0, 0, chunk.n_predicted).cumsum(-1, at::kDouble);
  // The total is 1 up to rounding; scaling u by it keeps the last token reachable and no more than that.
  const at::Tensor target =
      uniform.to(probabilities.device()) * cumulative.narrow(1, cumulative.size(1) - 1, 1);
  return at::searchsorted(cumulative, target, /*out_int32=*/false, /*right=*/true)
      .clamp_max_(cumulative.size(1) - 1);
}

/// ∂L/∂output of the final norm: (p − onehot(label)) · lm_head, the first factor in the compute dtype; zero
/// for the rows that predict nothing. p becomes that factor in its place. at_label [n_predicted] f32:
/// p(label) − 1.
at::Tensor output_gradient(at::Tensor p, const at::Tensor& labels, const at::Tensor& at_label,
                           const Chunk& chunk, const at::Tensor& lm_head) {
  // The cast of p first would leave few digits of 1 − p where the model is sure.
  // Not scatter_, which copies a short type to f32 and back.
  const at::Tensor rows = at::arange(chunk.n_predicted, labels.options());
  p.index_put_({rows, labels}, at_label.to(p.scalar_type()));
  p.narrow(0, chunk.n_predicted, chunk.n_tokens - chunk.n_predicted).zero_();
  return kernels::linear_backward(p, lm_head);
}

/// ∂KL/∂output of the final norm: (p − p̃) · lm_head, p̃ of the original model. The difference is taken in f32:
/// behind a well quantized prefix p and p̃ agree in most digits of a shorter type.
at::Tensor divergence_gradient(const at::Tensor& probabilities, const at::Tensor& original,
                               const Chunk& chunk, const at::Tensor& lm_head) {
  at::Tensor difference = probabilities - original;
  difference.narrow(0, chunk.n_predicted, chunk.n_tokens - chunk.n_predicted).zero_();
  return kernels::linear_backward(difference.to(lm_head.scalar_type()), lm_head);
}

}  // namespace

at::Tensor embed(const at::Tensor& embedding, const at::Tensor& tokens) {
  return at::embedding(embedding, tokens);
}

at::Tensor head_logits(const ModelConfig& config, const HeadWeights& head, const at::Tensor& hidden) {
  return kernels::linear_forward(kernels::rms_norm(hidden, head.final_norm, config.rms_eps), head.lm_head,
                                 {});
}

LossResult loss_and_gradient(const ModelConfig& config, const HeadWeights& head, const at::Tensor& hidden,
                             const at::Tensor& tokens, const at::Tensor& lengths, Range sequences,
                             const LossSpec& loss, const at::Tensor& original) {
  ISOBATH_CHECK(hidden.dim() == 3 && hidden.size(0) == tokens.size(0) && hidden.size(1) == tokens.size(1),
                "hidden states {} for tokens {}", fmt::join(hidden.sizes(), "x"),
                fmt::join(tokens.sizes(), "x"));
  ISOBATH_CHECK(sequences.size() == tokens.size(0) && lengths.numel() == tokens.size(0),
                "{} sequences and {} lengths for {} rows", sequences.size(), lengths.numel(), tokens.size(0));
  ISOBATH_CHECK(loss.n_samples >= 1 && (loss.kind == LossKind::fisher || loss.n_samples == 1), "{} samples",
                loss.n_samples);
  ISOBATH_CHECK(loss.kind != LossKind::kl || (original.defined() && original.sizes() == hidden.sizes()),
                "loss kl needs the original model's hidden states, {}", fmt::join(hidden.sizes(), "x"));
  const c10::AutoGradMode no_gradient(false);
  const at::Tensor labels = tokens.to(at::kLong);
  LossResult result;
  result.gradient =
      at::zeros({loss.n_samples, hidden.size(0), hidden.size(1), hidden.size(2)}, hidden.options());

  for (const Chunk& chunk : chunks_of(lengths.cpu(), hidden.size(1), sequences)) {
    const at::Tensor x = hidden[chunk.row].narrow(0, chunk.first, chunk.n_tokens);
    const at::Tensor normed = kernels::rms_norm(x, head.final_norm, config.rms_eps);
    const at::Tensor logits = kernels::linear_forward(normed, head.lm_head, {});
    // The last rows may have no label; any will do, their gradient is zero.
    const at::Tensor data_labels =
        at::constant_pad_nd(labels[chunk.row].narrow(0, chunk.first + 1, chunk.n_predicted),
                            {0, chunk.n_tokens - chunk.n_predicted});
    const bool draws = loss.kind == LossKind::fisher, compares = loss.kind == LossKind::kl;
    // Labels are drawn from probabilities in f32, and differences of probabilities taken.
    const kernels::LabelLoss data =
        kernels::label_loss(draws || compares ? logits.to(at::kFloat) : logits, data_labels);
    result.nll_sum += sum_nll(data.nll, chunk);
    result.n_predicted += chunk.n_predicted;
    const auto store = [&](int64_t sample, const at::Tensor& gradient) {
      result.gradient[sample][chunk.row]
          .narrow(0, chunk.first, chunk.n_tokens)
          .copy_(kernels::rms_norm_backward(x, head.final_norm, config.rms_eps, gradient, {}));
    };
    if (compares) {
      const at::Tensor original_logits =
          head_logits(config, head, original[chunk.row].narrow(0, chunk.first, chunk.n_tokens));
      const at::Tensor kl = kernels::compare_logits(original_logits, logits, data_labels).kl;
      result.kl_sum += kl.narrow(0, 0, chunk.n_predicted).sum(at::kDouble).item<double>();
      const kernels::LabelLoss before = kernels::label_loss(original_logits.to(at::kFloat), data_labels);
      store(0, divergence_gradient(data.probabilities, before.probabilities, chunk, head.lm_head));
      continue;
    }

    const at::Tensor samples = draws ? draw_labels(data.probabilities, chunk, loss)
                                     : data_labels.narrow(0, 0, chunk.n_predicted).unsqueeze(1);
    for (int64_t sample = 0; sample < loss.n_samples; ++sample) {
      const at::Tensor drawn = samples.select(1, sample);
      const at::Tensor logit =
          logits.narrow(0, 0, chunk.n_predicted).gather(1, drawn.unsqueeze(1)).squeeze(1).to(at::kFloat);
      const at::Tensor at_label = at::expm1(logit - data.log_sums.narrow(0, 0, chunk.n_predicted));
      // The last draw is the last use of the probabilities.
      at::Tensor p = data.probabilities.to(head.lm_head.scalar_type(), /*non_blocking=*/false,
                                           /*copy=*/sample + 1 < loss.n_samples);
      store(sample, output_gradient(std::move(p), drawn, at_label, chunk, head.lm_head));
    }
  }
  return result;
}

}  // namespace isobath::model
