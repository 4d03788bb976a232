#include <isobath/pipeline/perturbation_observer.hpp>

#include <ATen/ATen.h>

#include <isobath/quant/solver.hpp>
#include <isobath/sensitivity/perturbation.hpp>

namespace isobath::pipeline {

PerturbationObserver::PerturbationObserver(const Session& session, const std::string& module,
                                           at::Tensor weight, Range sequences)
    : session_(session), weight_(std::move(weight)), sequences_(sequences) {
  const config::Quantization& quantization = session.config.quantization;
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  const at::Tensor on_host = weight_.to(at::kCPU, at::kFloat).contiguous();
  std::vector<double> norms;
  for (const int bits : sensitivity.gram_bits) {
    const quant::GridSpec spec{.bits = bits,
                               .group = config::choice_for(quantization, module).group,
                               .symmetric = quantization.symmetric,
                               .clip_search = quantization.clip_search,
                               .storage = session.model().dtype};
    const quant::QuantizedMatrix rounded = quant::round_to_nearest(on_host, {}, spec);
    norms.push_back(
        (quant::dequantize(rounded).to(at::kFloat) - on_host).square().sum(at::kDouble).item<double>());
    grids_.push_back({spec, rounded.scale.to(session.device), rounded.zero.to(session.device)});
    value_.bits.push_back(bits);
    value_.grid = spec;
  }
  value_.grid.bits = 0;
  const auto n = sequences.size(), n_widths = std::ssize(grids_);
  value_.first_order = at::zeros({n, sensitivity.samples, n_widths}, at::kDouble);
  value_.output_change = at::zeros({n, n_widths}, at::kDouble);
  value_.weighted_change = at::zeros({n, n_widths}, at::kDouble);
  value_.gradient_norm = at::zeros({n, sensitivity.samples}, at::kDouble);
  value_.weight_change = at::tensor(norms, at::kDouble);
}

at::Tensor PerturbationObserver::change(const Grid& grid, Range rows) const {
  const at::Tensor w = weight_.slice(0, rows.begin, rows.end).to(at::kFloat);
  return quant::round_on_grid(w, grid.scale.slice(0, rows.begin, rows.end),
                              grid.zero.slice(0, rows.begin, rows.end), grid.spec)
      .sub_(w);
}

void PerturbationObserver::observe(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask,
                                   const at::Tensor& token_weights, Range sequences, int64_t sample) {
  const sensitivity::PerturbationScores scores = sensitivity::perturbation_scores(
      x, gradient, mask, token_weights, std::ssize(grids_),
      [this](int64_t candidate, Range rows) { return change(grids_[static_cast<size_t>(candidate)], rows); },
      {.first_sequence = sequences.begin,
       .sample = sample,
       .n_probes = session_.config.sensitivity.probes,
       .seed = session_.config.calibration.seed});
  const auto rows_of = [&](const at::Tensor& all) {
    return all.slice(0, sequences.begin - sequences_.begin, sequences.end - sequences_.begin);
  };
  rows_of(value_.first_order).select(1, sample).copy_(scores.first_order);
  rows_of(value_.gradient_norm).select(1, sample).copy_(scores.gradient_norm);
  // Estimates with fresh probes for each label draw: their mean has less noise.
  const double share = 1.0 / static_cast<double>(session_.config.sensitivity.samples);
  rows_of(value_.output_change).add_(scores.output_change, share);
  rows_of(value_.weighted_change).add_(scores.weighted_change, share);
}

}  // namespace isobath::pipeline
