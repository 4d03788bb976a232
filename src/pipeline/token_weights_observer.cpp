#include <isobath/pipeline/token_weights_observer.hpp>

#include <ATen/ATen.h>

#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::pipeline {

TokenWeightsObserver::TokenWeightsObserver(const Session& session, const CalibrationSet& calibration,
                                           BlockRowGroups row_groups, int64_t n_samples)
    : row_groups_(std::move(row_groups)),
      n_samples_(n_samples),
      sequences_(calibration.shards.sequences_of(session.grid->replica(), session.grid->shape().replicas)) {
  for (at::Tensor& value : value_)
    value = at::zeros({sequences_.size(), calibration.tokens.length(), session.config.sensitivity.row_groups},
                      at::kFloat);
}

void TokenWeightsObserver::begin(const data::Microbatch& microbatch, int64_t /*sample*/) {
  of_microbatch_ = microbatch.sequences;
}

void TokenWeightsObserver::observe(model::Projection projection, const at::Tensor& /*x*/,
                                   const at::Tensor& gradient) {
  (void)add(projection, gradient);
}

at::Tensor TokenWeightsObserver::add(model::Projection projection, const at::Tensor& gradient) {
  at::Tensor weights =
      sensitivity::token_weights(gradient, row_groups_[static_cast<size_t>(projection)]).cpu();
  // D of several Fisher samples is their mean.
  of_microbatch(projection).add_(weights, 1.0 / static_cast<double>(n_samples_));
  return weights;
}

at::Tensor TokenWeightsObserver::of_microbatch(model::Projection projection) const {
  return value(projection)
      .slice(0, of_microbatch_.begin - sequences_.begin, of_microbatch_.end - sequences_.begin);
}

}  // namespace isobath::pipeline
