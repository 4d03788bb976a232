#include <ATen/ATen.h>

#include <isobath/core/trace.hpp>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/prefix_activations.hpp>

namespace isobath::pipeline {

using model::Projection;

PrefixActivations::PrefixActivations(const Session& session, const CalibrationSet& calibration,
                                     std::string stream)
    : session_(session),
      stream_(std::move(stream)),
      rotary_(model::Rotary::make(session.model(), calibration.tokens.length(), session.device)),
      microbatches_(calibration.shards.microbatches_of(session.world().rank(), session.world().size())) {}

void PrefixActivations::embed(const at::Tensor& embedding, const at::Tensor& tokens) {
  for (const data::Microbatch& microbatch : microbatches_)
    hidden_[microbatch.index] = model::embed(
        embedding, tokens.slice(0, microbatch.sequences.begin, microbatch.sequences.end).to(session_.device));
}

at::Tensor PrefixActivations::input(int set, const model::BlockWeights& weights, int64_t microbatch) const {
  // The norms are computed again in `advance`: cheaper than keeping both their input and output.
  const double eps = session_.model().rms_eps;
  if (set == 0) return kernels::rms_norm(hidden_.at(microbatch), weights.input_norm, eps);
  if (set == 2) return kernels::rms_norm(hidden_.at(microbatch), weights.post_attention_norm, eps);
  return inner_.at(microbatch);
}

void PrefixActivations::advance(int set, const model::BlockWeights& weights, int64_t block) {
  const trace::Span span("forward of an input set", set);
  for (const data::Microbatch& microbatch : microbatches_) {
    const at::Tensor x = input(set, weights, microbatch.index);
    const auto apply = [&](Projection projection) { return model::apply_linear(x, weights[projection]); };
    at::Tensor& hidden = hidden_.at(microbatch.index);
    at::Tensor& inner = inner_[microbatch.index];
    switch (set) {
      case 0: {
        const at::Tensor q = apply(Projection::q), k = apply(Projection::k), v = apply(Projection::v);
        inner = model::attend(session_.model(), rotary_, weights, q, k, v).out;
        break;
      }
      case 1:
        hidden.add_(apply(Projection::o));
        break;
      case 2: {
        const at::Tensor gate = apply(Projection::gate), up = apply(Projection::up);
        inner = kernels::gated(gate, up);
        break;
      }
      default:
        hidden.add_(apply(Projection::down));
        inner.reset();
    }
  }
  if (set + 1 == model::kInputSets) require_finite(block);
}

void PrefixActivations::require_finite(int64_t block) const {
  for (const data::Microbatch& microbatch : microbatches_)
    if (!std::isfinite(hidden_.at(microbatch.index).sum(at::kFloat).item<float>()))
      fail<NumericError>("non-finite hidden state after {} block {}, sequences [{}, {})", stream_, block,
                         microbatch.sequences.begin, microbatch.sequences.end);
}

}  // namespace isobath::pipeline
