#include <isobath/pipeline/scale_gradients.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <isobath/kernels/gram.hpp>

namespace isobath::pipeline {
namespace {

// ∂L/∂W = Σ_n g_n x_nᵀ of one microbatch, [d_out, d_in] f32.
at::Tensor weight_gradient(const at::Tensor& x, const at::Tensor& gradient) {
  const at::Tensor input = x.flatten(0, 1), of_output = gradient.flatten(0, 1).to(x.scalar_type());
  at::Tensor sum =
      at::zeros({of_output.size(1), input.size(1)}, at::TensorOptions(at::kFloat).device(x.device()));
  if (!kernels::has_gram(input) || !kernels::add_product(sum, of_output, input))
    sum.addmm_(of_output.to(at::kFloat).t(), input.to(at::kFloat));
  return sum;
}

}  // namespace

ScaleGradients::ScaleGradients(const Session& session, const CalibrationSet& calibration,
                               const BlockTuners& tuners, const std::vector<int64_t>& shards)
    : session_(session), tuners_(tuners), shards_(shards) {
  const std::vector<int> owners = calibration.shards.owners(session.grid->shape().replicas);
  std::vector<int> of_leaves;
  for (const int64_t shard : shards) of_leaves.push_back(owners[static_cast<size_t>(shard)]);
  for (const auto& [projection, tuner] : tuners)
    modules_.emplace(projection, Module{comm::TreeSum(of_leaves, session.grid->replica()), {}});
}

void ScaleGradients::begin(const data::Microbatch& microbatch, int64_t /*sample*/) {
  shard_ = microbatch.shard;
}

void ScaleGradients::observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) {
  const auto found = modules_.find(projection);
  if (found == modules_.end()) return;
  const at::Tensor of_scales =
      quant::scale_gradient(weight_gradient(x, gradient), tuners_.at(projection).matrix());
  at::Tensor& shard = found->second.shard;
  shard = shard.defined() ? shard.add_(of_scales) : of_scales;
}

void ScaleGradients::finish_microbatch(bool is_last_of_shard) {
  if (!is_last_of_shard) return;
  const int64_t leaf = std::ranges::find(shards_, shard_) - shards_.begin();
  for (auto& [projection, module] : modules_)
    module.tree.add(leaf, std::exchange(module.shard, {}).contiguous());
}

at::Tensor ScaleGradients::reduce(model::Projection projection) {
  const comm::Communicator& replicas = session_.grid->replicas();
  constexpr int kRoot = 0;
  at::Tensor total = modules_.at(projection).tree.reduce_to(kRoot, replicas);
  if (!total.defined()) total = at::empty(tuners_.at(projection).matrix().scale.sizes(), at::kFloat);
  replicas.broadcast(total, kRoot);
  return total;
}

}  // namespace isobath::pipeline
