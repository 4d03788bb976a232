#include <isobath/pipeline/row_profile_observer.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <isobath/sensitivity/row_clusters.hpp>

namespace isobath::pipeline {

RowProfileObserver::RowProfileObserver(const Session& session, const CalibrationSet& calibration,
                                       int64_t block, const std::vector<data::Microbatch>& microbatches)
    : session_(session), root_(root_of_block(session, block)) {
  const std::vector<int> owners = calibration.shards.owners(session.grid->shape().replicas);
  std::vector<int> of_leaves;
  for (const data::Microbatch& microbatch : microbatches) {
    leaves_.push_back(microbatch.index);
    of_leaves.push_back(owners[static_cast<size_t>(microbatch.shard)]);
  }
  for (int p = 0; p < model::kProjections; ++p)
    modules_.push_back({comm::TreeSum(of_leaves, session.grid->replica()), {}});
}

void RowProfileObserver::begin(const data::Microbatch& microbatch, int64_t /*sample*/) {
  microbatch_ = microbatch;
}

void RowProfileObserver::observe(model::Projection projection, const at::Tensor& /*x*/,
                                 const at::Tensor& gradient) {
  const at::Tensor of_sample =
      sensitivity::row_profiles(gradient, microbatch_.sequences.begin, session_.config.calibration.seed);
  at::Tensor& profiles = modules_[static_cast<size_t>(projection)].profiles;
  profiles = profiles.defined() ? profiles.add_(of_sample) : of_sample;
}

void RowProfileObserver::finish_microbatch(bool /*is_last_of_shard*/) {
  const int64_t leaf = std::ranges::find(leaves_, microbatch_.index) - leaves_.begin();
  for (Module& module : modules_) module.tree.add(leaf, std::exchange(module.profiles, {}));
}

at::Tensor RowProfileObserver::reduce(model::Projection projection) {
  return modules_[static_cast<size_t>(projection)].tree.reduce_to(root_, session_.grid->replicas());
}

}  // namespace isobath::pipeline
