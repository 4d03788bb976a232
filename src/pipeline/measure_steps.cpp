#include "measure_steps.hpp"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace isobath::pipeline {

model::LossSpec loss_of(const Session& session, const MeasurePass& pass) {
  const std::string& loss = pass.loss.empty() ? session.config.sensitivity.loss : pass.loss;
  return {.kind = loss == "fisher" ? model::LossKind::fisher
                  : loss == "kl"   ? model::LossKind::kl
                                   : model::LossKind::nll,
          .n_samples = loss == "fisher" ? session.config.sensitivity.samples : 1,
          .seed = session.config.calibration.seed};
}

BlockRowGroups row_groups_of(const Session& session, const MeasurePass& pass, int64_t block) {
  return clusters_rows(session.config.sensitivity) ? pass.row_groups.at(block) : row_groups_of(session);
}

std::unique_ptr<StatisticsObserver> make_statistics_observer(const Session& session,
                                                             const CalibrationSet& calibration,
                                                             const MeasurePass& pass, int64_t block,
                                                             const model::BlockWeights& weights) {
  StatisticsObserver::Options options{.n_samples = loss_of(session, pass).n_samples,
                                      .row_groups = row_groups_of(session, pass, block)};
  if (pass.with_perturbations) {
    options.perturbed = &weights;
    for (const auto& version : pass.perturbed_versions)
      options.perturbed_versions.push_back(version->read_block(block, session.model().dtype, session.device));
  }
  return std::make_unique<StatisticsObserver>(session, calibration, block, options);
}

MeasureSteps::MeasureSteps(const Session& session, const CalibrationSet& calibration, const MeasurePass& pass)
    : session_(session),
      calibration_(calibration),
      pass_(pass),
      rotary_(model::Rotary::make(session.model(), calibration.tokens.length(), session.device)),
      loss_(loss_of(session, pass)) {}

at::Tensor MeasureSteps::enter(const at::Tensor& embedding, const data::Microbatch& microbatch) const {
  if (pass_.source) return pass_.source(microbatch);
  return model::embed(embedding, calibration_.tokens_of(microbatch.sequences).to(session_.device));
}

at::Tensor MeasureSteps::forward(const model::BlockWeights& weights, const at::Tensor& input,
                                 model::BlockActivations* keep) const {
  return model::block_forward(session_.model(), rotary_, weights, input, keep);
}

at::Tensor MeasureSteps::loss_gradient(const model::HeadWeights& head, const at::Tensor& output,
                                       const data::Microbatch& microbatch, at::Tensor& losses) const {
  model::LossResult loss = model::loss_and_gradient(
      session_.model(), head, output, calibration_.tokens_of(microbatch.sequences).to(session_.device),
      calibration_.lengths_of(microbatch.sequences), microbatch.sequences, loss_,
      pass_.original ? pass_.original(microbatch) : at::Tensor());
  losses[microbatch.index][0] = loss.nll_sum;
  losses[microbatch.index][1] = static_cast<double>(loss.n_predicted);
  losses[microbatch.index][2] = loss.kl_sum;
  return std::move(loss.gradient);
}

at::Tensor MeasureSteps::backward(const model::BlockWeights& weights, model::BlockActivations& activations,
                                  const at::Tensor& gradient, const data::Microbatch& microbatch,
                                  bool closes_shard, BlockObserver& observer) const {
  const at::NoGradGuard no_grad;
  if (!activations.middle.defined()) (void)forward(weights, at::Tensor(activations.input), &activations);
  std::vector<at::Tensor> input_gradients;
  for (int64_t sample = 0; sample < loss_.n_samples; ++sample) {
    observer.begin(microbatch, sample);
    input_gradients.push_back(model::block_backward(
        session_.model(), rotary_, weights, activations, gradient[sample],
        [&](model::Projection projection, const at::Tensor& x, const at::Tensor& output_gradient) {
          observer.observe(projection, x, output_gradient);
        }));
  }
  observer.finish_microbatch(closes_shard);
  return at::stack(input_gradients);
}

}  // namespace isobath::pipeline
