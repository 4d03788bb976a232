#include <isobath/pipeline/block_observer.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <isobath/core/host_memory.hpp>
#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::pipeline {
namespace {

sensitivity::PerSequence per_sequence_of(const config::Sensitivity& sensitivity) {
  if (sensitivity.per_sequence == "exact") return sensitivity::PerSequence::exact;
  return sensitivity.per_sequence == "probes" ? sensitivity::PerSequence::probes
                                              : sensitivity::PerSequence::off;
}

// Point-to-point tags of one block's reductions, apart from each other by more than the tree's depth.
constexpr int kTagStride = 64;

}  // namespace

BlockObserver::BlockObserver(const Session& session, const CalibrationSet& calibration, int64_t block,
                             const Options& options)
    : session_(session),
      calibration_(calibration),
      block_(block),
      n_samples_(options.n_samples),
      only_token_weights_(options.only_token_weights),
      profiled_(options.profiled),
      row_groups_(options.row_groups) {
  const int replica = session.grid->replica(), n_replicas = session.grid->shape().replicas;
  local_sequences_ = calibration.shards.sequences_of(replica, n_replicas);
  const std::vector<int> owners = calibration.shards.owners(n_replicas);
  if (profiled_ != nullptr) {
    std::vector<int> of_leaves;
    for (const data::Microbatch& microbatch : *profiled_)
      of_leaves.push_back(owners[static_cast<size_t>(microbatch.shard)]);
    for (Module& module : modules_) module.profiles.emplace_back(of_leaves, replica);
    return;
  }
  if (options.tuners != nullptr) {
    scale_gradients_.emplace(session, calibration, options.tuners->at(block), options.tuned_shards);
    return;
  }
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  for (Module& module : modules_) {
    module.token_weights =
        at::zeros({local_sequences_.size(), calibration.tokens.length(), sensitivity.row_groups}, at::kFloat);
    if (only_token_weights_) continue;
    module.sums.emplace_back(owners, replica);
    module.maxima.emplace_back(owners, replica, comm::Reduce::max);
    if (sensitivity.covariance)
      for (int64_t k = 0; k < sensitivity.row_groups; ++k) module.covariances.emplace_back(owners, replica);
  }
  if (options.perturbed == nullptr || sensitivity.gram_bits.empty()) return;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    const std::string name = model::module_name(block, projection);
    if (!config::choice_for(session.config.quantization, name).quantized) continue;
    std::vector<at::Tensor> versions;
    for (const model::BlockWeights& version : options.perturbed_versions)
      versions.push_back(version[projection].weight);
    modules_[static_cast<size_t>(p)].perturbations.emplace(
        session, name, (*options.perturbed)[projection].weight, std::move(versions), local_sequences_);
  }
  // Grids that stay were cut from the holes that the fitting of the last linear left, too small for the next.
  return_free_memory();
}

void BlockObserver::begin(const data::Microbatch& microbatch, int64_t sample) {
  if (sample == 0) mask_ = calibration_.mask_of(microbatch.sequences);
  microbatch_ = microbatch;
  sample_ = sample;
}

void BlockObserver::open_shard(Module& module, int64_t n_channels) {
  const config::Sensitivity& sensitivity = session_.config.sensitivity;
  module.shard.emplace(n_channels, per_sequence_of(sensitivity), sensitivity.probes,
                       session_.config.calibration.seed);
  module.shard_covariances.clear();
  for (size_t k = 0; k < module.covariances.size(); ++k)
    module.shard_covariances.emplace_back(n_channels, session_.device);
}

void BlockObserver::observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) {
  if (scale_gradients_) return scale_gradients_->observe(projection, x, gradient);
  Module& module = modules_[static_cast<size_t>(projection)];
  if (profiled_ != nullptr) {
    const at::Tensor profile =
        sensitivity::row_profiles(gradient, microbatch_.sequences.begin, session_.config.calibration.seed);
    module.profile = module.profile.defined() ? module.profile.add_(profile) : profile;
    return;
  }
  if (!only_token_weights_) {
    if (!module.shard) open_shard(module, x.size(2));
    try {
      module.shard->observe(x, gradient, mask_, microbatch_.sequences.begin, sample_);
    } catch (const Error&) {
      std::throw_with_nested(
          NumericError(fmt::format("measuring {}", model::module_name(block_, projection))));
    }
  }
  const at::Tensor weights =
      sensitivity::token_weights(gradient, row_groups_[static_cast<size_t>(projection)]).cpu();
  // D of several Fisher samples is their mean.
  module.token_weights
      .slice(0, microbatch_.sequences.begin - local_sequences_.begin,
             microbatch_.sequences.end - local_sequences_.begin)
      .add_(weights, 1.0 / static_cast<double>(n_samples_));
  if (module.perturbations)
    module.perturbations->observe(x, gradient, mask_, weights.mean(2), microbatch_.sequences, sample_);
  if (!module.covariances.empty()) module.input = x;
}

void BlockObserver::finish_microbatch(bool is_last_of_shard) {
  if (profiled_ != nullptr) {
    const auto leaf = std::ranges::find(*profiled_, microbatch_.index, &data::Microbatch::index);
    for (Module& module : modules_)
      module.profiles[0].add(leaf - profiled_->begin(), std::exchange(module.profile, {}));
    return;
  }
  if (scale_gradients_ && is_last_of_shard) scale_gradients_->close(microbatch_.shard);
  if (only_token_weights_ || scale_gradients_) return;
  for (Module& module : modules_) {
    for (size_t k = 0; k < module.shard_covariances.size(); ++k) {
      const at::Tensor weights = module.token_weights
                                     .slice(0, microbatch_.sequences.begin - local_sequences_.begin,
                                            microbatch_.sequences.end - local_sequences_.begin)
                                     .select(2, static_cast<int64_t>(k));
      module.shard_covariances[k].add(module.input.flatten(0, 1), weights.flatten().to(session_.device));
    }
    module.input.reset();
    if (!is_last_of_shard) continue;
    module.sums[0].add(microbatch_.shard, module.shard->sums());
    module.maxima[0].add(microbatch_.shard, module.shard->maxima());
    for (size_t k = 0; k < module.shard_covariances.size(); ++k)
      module.covariances[k].add(microbatch_.shard, module.shard_covariances[k].take_upper().cpu());
    module.shard.reset();
  }
}

int BlockObserver::root() const {
  return static_cast<int>(block_ % session_.grid->shape().replicas);
}

// Rows [n_local, …] of each replica's sequences, put together on the root in the order of the sequences.
at::Tensor BlockObserver::gather(const at::Tensor& rows, int tag) const {
  const comm::Communicator& replicas = session_.grid->replicas();
  if (replicas.rank() != root()) {
    if (local_sequences_.size() > 0) replicas.send(rows, root(), tag);
    return {};
  }
  std::vector<at::Tensor> parts;
  for (int r = 0; r < replicas.size(); ++r) {
    const Range sequences = calibration_.shards.sequences_of(r, replicas.size());
    if (sequences.size() == 0) continue;
    std::vector<int64_t> shape = rows.sizes().vec();
    shape[0] = sequences.size();
    parts.push_back(r == replicas.rank() ? rows : at::empty(shape, rows.options()));
    if (r != replicas.rank()) replicas.receive(parts.back(), r, tag);
  }
  return at::cat(parts);
}

Perturbations BlockObserver::gather(const Perturbations& local) const {
  Perturbations all = local;  // widths, grid and the norms of the weights are the same on every replica
  all.first_order = gather(local.first_order, 3 * kTagStride + 1);
  all.output_change = gather(local.output_change, 3 * kTagStride + 2);
  all.weighted_change = gather(local.weighted_change, 3 * kTagStride + 3);
  all.gradient_norm = gather(local.gradient_norm, 3 * kTagStride + 4);
  return all;
}

at::Tensor BlockObserver::reduce_profile(model::Projection projection) {
  ISOBATH_CHECK(profiled_ != nullptr, "block {} observed no row profiles", block_);
  return modules_[static_cast<size_t>(projection)].profiles[0].reduce_to(root(), session_.grid->replicas());
}

at::Tensor BlockObserver::reduce_scale_gradient(model::Projection projection) {
  ISOBATH_CHECK(scale_gradients_, "block {} observed no gradients of scales", block_);
  return scale_gradients_->reduce(projection);
}

BlockStatistics BlockObserver::reduce() {
  ISOBATH_CHECK(!only_token_weights_ && profiled_ == nullptr && !scale_gradients_,
                "block {} observed nothing but token weights, row profiles or gradients of scales", block_);
  const comm::Communicator& replicas = session_.grid->replicas();
  const bool is_root = replicas.rank() == root();
  const config::Sensitivity& sensitivity = session_.config.sensitivity;
  BlockStatistics result;
  for (size_t p = 0; p < modules_.size(); ++p) {
    Module& module = modules_[p];
    ModuleStatistics& statistics = result[p];
    const at::Tensor sums = module.sums[0].reduce_to(root(), replicas, 0);
    const at::Tensor maxima = module.maxima[0].reduce_to(root(), replicas, kTagStride);
    std::vector<at::Tensor> covariances;
    for (comm::TreeSum& tree : module.covariances) {
      at::Tensor upper = tree.reduce_to(root(), replicas, 2 * kTagStride);
      if (is_root) covariances.push_back(sensitivity::mirrored(std::move(upper)));
    }
    statistics.token_weights = gather(module.token_weights, 3 * kTagStride);
    if (module.perturbations) statistics.perturbations = gather(module.perturbations->value());
    if (!is_root) continue;
    const auto channels = sensitivity::ChannelStatistics::from(sums, maxima);
    statistics.row_groups = row_groups_[p];
    statistics.sum_x2 = channels.sum_squares();
    statistics.max_abs_x = maxima;
    // Fisher samples are draws of the same expectation: sums over them become means.
    statistics.alpha_per_token = channels.alpha_per_token() / static_cast<double>(n_samples_);
    if (sensitivity.per_sequence != "off")
      statistics.alpha_per_sequence = channels.alpha_per_sequence() / static_cast<double>(n_samples_);
    if (!covariances.empty()) statistics.covariance = at::stack(covariances);
    statistics.n_tokens = channels.n_tokens();
    statistics.n_sequences = channels.n_sequences();
  }
  return result;
}

}  // namespace isobath::pipeline
