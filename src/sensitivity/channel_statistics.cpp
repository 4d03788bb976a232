#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <isobath/core/error.hpp>
#include <isobath/core/random.hpp>
#include <isobath/kernels/squares.hpp>
#include <isobath/sensitivity/channel_statistics.hpp>

#include "probe_signs.hpp"

namespace isobath::sensitivity {
namespace {

enum Row : int64_t { kSumSquares, kPerToken, kPerSequence, kTokens, kSequences, kRows };

/// Names the first value that is not finite, or the largest ones when only their squares overflow.
[[noreturn]] void report_non_finite(const at::Tensor& x, const at::Tensor& gradient,
                                    const at::Tensor& padding, int64_t sequence) {
  const at::Tensor x_f32 = without(padding, x), g_f32 = without(padding, gradient);
  for (const auto& [values, what] : {std::pair{x_f32, "activation"}, std::pair{g_f32, "gradient"}}) {
    const at::Tensor bad = values.isfinite().logical_not().nonzero();
    if (bad.size(0) == 0) continue;
    const auto token = bad[0][0].item<int64_t>(), channel = bad[0][1].item<int64_t>();
    fail<NumericError>(
        "expected finite values, found {} {} in channel {} at sequence {}, token {}; check the weights of "
        "the "
        "model, or compute in f32",
        what, values[token][channel].item<double>(), channel, sequence, token);
  }
  fail<NumericError>(
      "channel statistics of sequence {} overflow f32: largest activation {}, largest gradient {}; check the "
      "weights of the model",
      sequence, x_f32.abs().max().item<double>(), g_f32.abs().max().item<double>());
}

}  // namespace

ChannelStatistics::ChannelStatistics(int64_t n_channels, PerSequence per_sequence, int64_t n_probes,
                                     uint64_t seed)
    : sums_(at::zeros({kRows, n_channels}, at::kDouble)),
      maxima_(at::zeros({n_channels}, at::kFloat)),
      per_sequence_(per_sequence),
      n_probes_(n_probes),
      seed_(seed) {
  ISOBATH_CHECK(per_sequence != PerSequence::probes || n_probes > 0, "probes need at least one probe, got {}",
                n_probes);
}

void ChannelStatistics::observe(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask,
                                int64_t first_sequence, int64_t sample) {
  ISOBATH_CHECK(x.dim() == 3 && x.size(2) == sums_.size(1), "x [b, T, {}] expected", sums_.size(1));
  ISOBATH_CHECK(gradient.dim() == 3 && gradient.size(0) == x.size(0) && gradient.size(1) == x.size(1),
                "gradient [{}, {}, d_out] expected", x.size(0), x.size(1));
  ISOBATH_CHECK(!mask.defined() || mask.sizes() == x.sizes().slice(0, 2), "mask [{}, {}] expected", x.size(0),
                x.size(1));
  ISOBATH_CHECK(sample >= 0, "sample {}", sample);
  const c10::NoGradGuard no_grad;
  const int64_t length = x.size(1);
  for (int64_t b = 0; b < x.size(0); ++b) {
    const int64_t sequence = first_sequence + b;
    at::Tensor inputs = x[b], norms = kernels::row_squares(gradient[b]), padding;
    if (mask.defined() && !mask[b].all().item<bool>()) padding = mask[b].logical_not().to(x.device());
    if (padding.defined()) {
      inputs = inputs.masked_fill(padding.unsqueeze(1), 0.0);
      norms.masked_fill_(padding, 0.0);
    }
    const kernels::ChannelSquares squares = kernels::channel_squares(inputs, norms);
    if (!std::isfinite((squares.plain.sum() + squares.weighted.sum()).item<double>()))
      report_non_finite(x[b], gradient[b], padding, sequence);
    sums_[kPerToken].add_(squares.weighted);
    // Every label sample sees the same activations: they count once.
    if (sample == 0) {
      sums_[kSumSquares].add_(squares.plain);
      maxima_ = at::maximum(maxima_, squares.largest);
      sums_[kTokens][0] += padding.defined() ? length - padding.sum().item<int64_t>() : length;
      sums_[kSequences][0] += 1;
    }
    if (per_sequence_ == PerSequence::off) continue;
    const at::Tensor x_f32 = without(padding, x[b]), g_f32 = without(padding, gradient[b]);
    if (per_sequence_ == PerSequence::exact) {
      sums_[kPerSequence].add_(at::mm(g_f32.t(), x_f32).square_().sum(0).to(at::kCPU, at::kDouble));
    } else {
      const CounterRandom random(seed_, RandomPurpose::probe_sign);
      const at::Tensor signs =
          probe_signs(random, sequence, sample, n_probes_, gradient.size(2)).to(g_f32.device());
      // E[(rᵀ GᵀX_:j)²] = ‖GᵀX_:j‖² for independent signs r.
      const at::Tensor projected = at::mm(at::mm(signs, g_f32.t()), x_f32).to(at::kCPU, at::kDouble);
      sums_[kPerSequence].add_(projected.square().mean(0));
    }
  }
}

at::Tensor ChannelStatistics::sums() const {
  return sums_.clone();
}

at::Tensor ChannelStatistics::maxima() const {
  return maxima_.clone();
}

ChannelStatistics ChannelStatistics::from(const at::Tensor& sums, const at::Tensor& maxima) {
  ISOBATH_CHECK(sums.dim() == 2 && sums.size(0) == kRows && sums.scalar_type() == at::kDouble,
                "sums [{}, n_channels] f64 expected", int64_t{kRows});
  ISOBATH_CHECK(maxima.dim() == 1 && maxima.size(0) == sums.size(1) && maxima.scalar_type() == at::kFloat,
                "maxima [{}] f32 expected", sums.size(1));
  ChannelStatistics statistics(sums.size(1), PerSequence::off, 0, 0);
  statistics.sums_ = sums.clone();
  statistics.maxima_ = maxima.clone();
  return statistics;
}

at::Tensor ChannelStatistics::sum_squares() const {
  return sums_[kSumSquares].clone();
}

at::Tensor ChannelStatistics::alpha_per_token() const {
  return sums_[kPerToken].clone();
}

at::Tensor ChannelStatistics::alpha_per_sequence() const {
  return sums_[kPerSequence].clone();
}

int64_t ChannelStatistics::n_tokens() const {
  return sums_[kTokens][0].item<int64_t>();
}

int64_t ChannelStatistics::n_sequences() const {
  return sums_[kSequences][0].item<int64_t>();
}

}  // namespace isobath::sensitivity
