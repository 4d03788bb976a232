#include <isobath/pipeline/perturbation_observer.hpp>

#include <ATen/ATen.h>

#include <isobath/quant/solver.hpp>
#include <isobath/sensitivity/perturbation.hpp>

namespace isobath::pipeline {

PerturbationObserver::PerturbationObserver(const Session& session, const std::string& module,
                                           at::Tensor weight, std::vector<at::Tensor> versions,
                                           Range sequences)
    : session_(session), weight_(std::move(weight)), sequences_(sequences), versions_(std::move(versions)) {
  const config::Quantization& quantization = session.config.quantization;
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  value_.bits.assign(sensitivity.gram_bits.begin(), sensitivity.gram_bits.end());
  value_.grid = {.bits = 0,
                 .group = config::choice_for(quantization, module).group,
                 .symmetric = quantization.symmetric,
                 .clip_search = quantization.clip_search,
                 .storage = session.model().dtype};
  value_.is_solved = !versions_.empty();
  if (versions_.empty()) fit_grids();
  std::vector<double> norms;
  for (int64_t k = 0; k < std::ssize(value_.bits); ++k)
    norms.push_back(change(k, {0, weight_.size(0)}).square().sum(at::kDouble).item<double>());
  const auto n = sequences.size(), n_widths = std::ssize(value_.bits);
  value_.first_order = at::zeros({n, sensitivity.samples, n_widths}, at::kDouble);
  value_.output_change = at::zeros({n, n_widths}, at::kDouble);
  value_.weighted_change = at::zeros({n, n_widths}, at::kDouble);
  value_.gradient_norm = at::zeros({n, sensitivity.samples}, at::kDouble);
  value_.weight_change = at::tensor(norms, at::kDouble);
}

void PerturbationObserver::fit_grids() {
  const at::Tensor on_host = weight_.to(at::kCPU, at::kFloat).contiguous();
  for (const int64_t bits : value_.bits) {
    quant::GridSpec spec = value_.grid;
    spec.bits = static_cast<int>(bits);
    const quant::QuantizedMatrix rounded = quant::round_to_nearest(on_host, {}, spec);
    grids_.push_back({spec, rounded.scale.to(session_.device), rounded.zero.to(session_.device)});
  }
}

at::Tensor PerturbationObserver::change(int64_t candidate, Range rows) const {
  const auto k = static_cast<size_t>(candidate);
  const at::Tensor w = weight_.slice(0, rows.begin, rows.end).to(at::kFloat);
  if (!versions_.empty()) return versions_[k].slice(0, rows.begin, rows.end).to(at::kFloat).sub_(w);
  const Grid& grid = grids_[k];
  return quant::round_on_grid(w, grid.scale.slice(0, rows.begin, rows.end),
                              grid.zero.slice(0, rows.begin, rows.end), grid.spec)
      .sub_(w);
}

void PerturbationObserver::observe(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask,
                                   const at::Tensor& token_weights, Range sequences, int64_t sample) {
  const sensitivity::PerturbationScores scores = sensitivity::perturbation_scores(
      x, gradient, mask, token_weights, std::ssize(value_.bits),
      [this](int64_t candidate, Range rows) { return change(candidate, rows); },
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
