#pragma once
#include <isobath/config/run_config.hpp>
#include <isobath/core/partition.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/model/model_config.hpp>
#include <isobath/plan/cluster.hpp>
#include <isobath/plan/work.hpp>
#include <vector>

namespace isobath::plan {

/// Who does what on a grid of stages x replicas: the largest share of each kind, which the others wait for.
struct Layout {
  int stages = 1, replicas = 1;
  std::vector<Range> blocks = {};  ///< of each stage
  int64_t n_shards = 1;            ///< logical shards
  int64_t largest_microbatch = 1;  ///< sequences; no more than a shard has
  // measure: replicas share the sequences
  int64_t microbatches_per_replica = 1, sequences_per_replica = 1, shards_per_replica = 1;
  int64_t segments = 1;  ///< times the pipeline fills and drains
  // quantize: all ranks share the sequences
  int64_t sequences_per_rank = 1, shards_per_rank = 1;

  [[nodiscard]] int64_t n_ranks() const { return int64_t{stages} * replicas; }
  [[nodiscard]] int stage_of(int64_t block) const;

  /// Throws ConfigError when the model has fewer blocks than stages.
  static Layout of(const config::Calibration& calibration, const model::ModelConfig& model, int stages,
                   int replicas, const model::Activations& activations = {});
};

/// Whether one rank must factorize H whole: for gptaq, act-order.
[[nodiscard]] inline bool needs_whole(const config::Quantization& quantization) {
  return quantization.solver != "round_to_nearest" &&
         (quantization.asymmetric.correction == "gptaq" || quantization.act_order != "none");
}

/// Rows of P below C (quant/correction.hpp) for this linear: d_model for one that is added to the residual
/// stream when the configuration asks for that correction, else 0.
[[nodiscard]] inline int64_t residual_channels(const config::Quantization& quantization,
                                               const model::ModelConfig& model,
                                               model::Projection projection) {
  const bool is_added = projection == model::Projection::o || projection == model::Projection::down;
  return is_added && quantization.corrects_residual() ? model.d_model : 0;
}

/// A run on a cluster: what memory and time are functions of. References outlive it.
struct Job {
  const config::RunConfig& config;
  const model::ModelConfig& model;
  const Cluster& cluster;
  bool computes_bf16;
  Layout layout;
  Shapes shapes;

  Job(const config::RunConfig& config, const model::ModelConfig& model, const Cluster& cluster, int stages,
      int replicas);

  /// Sequences of a microbatch on average over a replica: a shard's last one may be smaller.
  [[nodiscard]] double mean_microbatch() const {
    return static_cast<double>(layout.sequences_per_replica) /
           static_cast<double>(layout.microbatches_per_replica);
  }
  [[nodiscard]] double length() const { return static_cast<double>(config.calibration.length); }
  [[nodiscard]] double n_tokens() const {
    return static_cast<double>(config.calibration.sequences) * length();
  }
  [[nodiscard]] bool uses_covariance() const { return config.quantization.solver != "round_to_nearest"; }
  [[nodiscard]] bool is_weighted() const {
    return uses_covariance() && config.quantization.weighting == "sensitivity";
  }
  [[nodiscard]] bool is_asymmetric() const { return config.quantization.is_asymmetric(); }
  [[nodiscard]] bool is_qep() const {
    return is_asymmetric() && config.quantization.asymmetric.correction == "qep";
  }
  [[nodiscard]] bool refines() const {
    return uses_covariance() && config.quantization.refinement.sweeps > 0;
  }
  /// Whether one rank factorizes an H of any width.
  [[nodiscard]] bool needs_whole() const { return plan::needs_whole(config.quantization); }
  /// Whether an H of d channels is factorized in panels that belong to the ranks in turn.
  [[nodiscard]] bool is_spread(double d) const;
  /// The most of n_rows rows that one rank solves: whole tiles.
  [[nodiscard]] double largest_row_share(double n_rows) const;
  [[nodiscard]] bool is_streamed() const { return config.residency == "streamed"; }
  /// Whether quantize measures D again.
  [[nodiscard]] bool reestimates() const {
    const config::Reestimate& reestimate = config.quantization.reestimate;
    return is_weighted() && reestimate.policy != "never" && reestimate.blocks < model.n_blocks;
  }
  /// Whether scales are tuned behind the quantize pass.
  [[nodiscard]] bool tunes() const { return config.quantization.tuning.epochs > 0; }
  /// Rows of P below C for an input set.
  [[nodiscard]] double residual_channels(int set) const {
    return static_cast<double>(
        plan::residual_channels(config.quantization, model, model::input_set(set).front()));
  }
  /// Whether resident weights of the next block come from another stage while one is in work.
  [[nodiscard]] bool shares_next_block() const { return !is_streamed() && layout.stages > 1; }
  [[nodiscard]] int64_t ranks_on_node() const { return std::min(cluster.ranks_per_node, layout.n_ranks()); }
  /// Hidden states that travel through the quantize pass: the original model's too, or not.
  [[nodiscard]] int64_t streams() const { return is_asymmetric() ? 2 : 1; }
  /// Last blocks of a stage that keep their activations for the backward pass; the others are recomputed.
  [[nodiscard]] int64_t kept_blocks(int stage) const;
  /// What a stage may keep of a measure pass (pipeline/session.hpp).
  [[nodiscard]] model::Activations kept_activations() const;
  /// What a generation saves, all ranks: the streams' hidden states.
  [[nodiscard]] double hidden_bytes() const;
  /// D of one block, all sequences.
  [[nodiscard]] double token_weight_bytes() const;
  /// Covariances solved together for an input set (BlockSolver::make_units): one for each module and row
  /// group, or one for all with D = 1.
  [[nodiscard]] int64_t units_of(int set) const;
  /// The most of them that one rank factorizes: roots rotate.
  [[nodiscard]] int64_t units_of_root(int set) const;
  /// Bytes of a block in the quantized checkpoint, or in one of this width on the same grids.
  [[nodiscard]] double quantized_block_bytes(int64_t block, int bits = 0) const;
  /// Scales of the quantized linears of a block.
  [[nodiscard]] double scales_of_block(int64_t block) const;
  /// Bytes of a checkpoint in its own dtype: one block, and what stands outside the blocks.
  [[nodiscard]] double stored_block_bytes() const;
  [[nodiscard]] double stored_end_bytes() const;
  [[nodiscard]] int64_t nodes() const;
};

/// auto takes the checkpoint's bf16 where the cluster is faster in it (pipeline/session.cpp).
[[nodiscard]] bool computes_bf16(const config::RunConfig& config, const model::ModelConfig& model,
                                 const Cluster& cluster);

}  // namespace isobath::plan
