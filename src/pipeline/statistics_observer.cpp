#include <isobath/pipeline/statistics_observer.hpp>

#include <ATen/ATen.h>

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

StatisticsObserver::StatisticsObserver(const Session& session, const CalibrationSet& calibration,
                                       int64_t block, const Options& options)
    : session_(session),
      calibration_(calibration),
      block_(block),
      root_(root_of_block(session, block)),
      n_samples_(options.n_samples),
      token_weights_(session, calibration, options.row_groups, options.n_samples) {
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  const int replica = session.grid->replica();
  const std::vector<int> owners = calibration.shards.owners(session.grid->shape().replicas);
  for (int p = 0; p < model::kProjections; ++p) {
    Module& module = modules_.emplace_back(Module{
        .sums = comm::TreeSum(owners, replica), .maxima = comm::TreeSum(owners, replica, comm::Reduce::max)});
    if (sensitivity.covariance)
      for (int64_t k = 0; k < sensitivity.row_groups; ++k) module.covariances.emplace_back(owners, replica);
    const auto projection = static_cast<model::Projection>(p);
    const std::string name = model::module_name(block, projection);
    if (options.perturbed == nullptr || sensitivity.gram_bits.empty() ||
        !config::choice_for(session.config.quantization, name).quantized)
      continue;
    std::vector<at::Tensor> versions;
    for (const model::BlockWeights& version : options.perturbed_versions)
      versions.push_back(version[projection].weight);
    module.perturbations.emplace(session, name, (*options.perturbed)[projection].weight, std::move(versions),
                                 token_weights_.sequences());
  }
}

void StatisticsObserver::begin(const data::Microbatch& microbatch, int64_t sample) {
  if (sample == 0) mask_ = calibration_.mask_of(microbatch.sequences);
  microbatch_ = microbatch;
  sample_ = sample;
  token_weights_.begin(microbatch, sample);
}

void StatisticsObserver::open_shard(Module& module, int64_t n_channels) {
  const config::Sensitivity& sensitivity = session_.config.sensitivity;
  module.shard.emplace(n_channels, per_sequence_of(sensitivity), sensitivity.probes,
                       session_.config.calibration.seed);
  module.shard_covariances.clear();
  for (size_t k = 0; k < module.covariances.size(); ++k)
    module.shard_covariances.emplace_back(n_channels, session_.device);
}

void StatisticsObserver::observe(model::Projection projection, const at::Tensor& x,
                                 const at::Tensor& gradient) {
  Module& module = modules_[static_cast<size_t>(projection)];
  if (!module.shard) open_shard(module, x.size(2));
  try {
    module.shard->observe(x, gradient, mask_, microbatch_.sequences.begin, sample_);
  } catch (const Error&) {
    std::throw_with_nested(NumericError(fmt::format("measuring {}", model::module_name(block_, projection))));
  }
  const at::Tensor weights = token_weights_.add(projection, gradient);
  if (module.perturbations)
    module.perturbations->observe(
        x, gradient, mask_,
        sensitivity::mean_over_channels(weights,
                                        token_weights_.row_groups()[static_cast<size_t>(projection)].ranges),
        microbatch_.sequences, sample_);
  if (!module.covariances.empty()) module.input = x;
}

void StatisticsObserver::finish_microbatch(bool is_last_of_shard) {
  for (size_t p = 0; p < modules_.size(); ++p) {
    Module& module = modules_[p];
    for (size_t k = 0; k < module.shard_covariances.size(); ++k) {
      const at::Tensor weights =
          token_weights_.of_microbatch(static_cast<model::Projection>(p)).select(2, static_cast<int64_t>(k));
      module.shard_covariances[k].add(module.input.flatten(0, 1), weights.flatten().to(session_.device));
    }
    module.input.reset();
    if (!is_last_of_shard) continue;
    module.sums.add(microbatch_.shard, module.shard->sums());
    module.maxima.add(microbatch_.shard, module.shard->maxima());
    for (size_t k = 0; k < module.shard_covariances.size(); ++k)
      module.covariances[k].add(microbatch_.shard, module.shard_covariances[k].take_upper().cpu());
    module.shard.reset();
  }
}

// Rows [n_local, …] of each replica's sequences, put together on the root in the order of the sequences.
at::Tensor StatisticsObserver::gather(const at::Tensor& rows, int tag) const {
  const comm::Communicator& replicas = session_.grid->replicas();
  if (replicas.rank() != root_) {
    if (token_weights_.sequences().size() > 0) replicas.send(rows, root_, tag);
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

Perturbations StatisticsObserver::gather(const Perturbations& local) const {
  Perturbations all = local;  // widths, grid and the norms of the weights are the same on every replica
  all.first_order = gather(local.first_order, 3 * kTagStride + 1);
  all.output_change = gather(local.output_change, 3 * kTagStride + 2);
  all.weighted_change = gather(local.weighted_change, 3 * kTagStride + 3);
  all.gradient_norm = gather(local.gradient_norm, 3 * kTagStride + 4);
  return all;
}

BlockStatistics StatisticsObserver::reduce() {
  const comm::Communicator& replicas = session_.grid->replicas();
  const bool is_root = replicas.rank() == root_;
  const config::Sensitivity& sensitivity = session_.config.sensitivity;
  BlockStatistics result;
  for (size_t p = 0; p < modules_.size(); ++p) {
    Module& module = modules_[p];
    ModuleStatistics& statistics = result[p];
    const at::Tensor sums = module.sums.reduce_to(root_, replicas, 0);
    const at::Tensor maxima = module.maxima.reduce_to(root_, replicas, kTagStride);
    std::vector<at::Tensor> covariances;
    for (comm::TreeSum& tree : module.covariances) {
      at::Tensor upper = tree.reduce_to(root_, replicas, 2 * kTagStride);
      if (is_root) covariances.push_back(sensitivity::mirrored(std::move(upper)));
    }
    statistics.token_weights =
        gather(token_weights_.value(static_cast<model::Projection>(p)), 3 * kTagStride);
    if (module.perturbations) statistics.perturbations = gather(module.perturbations->value());
    if (!is_root) continue;
    const auto channels = sensitivity::ChannelStatistics::from(sums, maxima);
    statistics.row_groups = token_weights_.row_groups()[p];
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
