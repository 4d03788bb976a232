#pragma once
#include <cstdint>
#include <isobath/comm/grid.hpp>
#include <isobath/config/run_config.hpp>
#include <vector>

namespace isobath::pipeline {

/// One action of a stage: the forward or the backward pass of one of its replica's microbatches.
struct Step {
  enum class Kind { forward, backward };
  Kind kind;
  int64_t microbatch;  ///< position in the replica's list
  bool operator==(const Step&) const = default;
};

/// One-forward-one-backward order for stage `position` of `n_stages`: at most n_stages − position
/// microbatches are in flight.
///
///   3 microbatches, 2 stages:  stage 0: F0 F1 B0 F2 B1 B2    stage 1: F0 B0 F1 B1 F2 B2
///
/// Source   Narayanan et al., PipeDream-Flush / 1F1B (SC21, §2.2).
[[nodiscard]] std::vector<Step> one_forward_one_backward(int64_t n_microbatches, int position, int n_stages);

/// Grid of `n_ranks` that finishes a backward pass first by the cost model: minimises (most expensive stage)
/// × (microbatches per replica + stages − 1) over the stages × replicas = n_ranks whose stage weights fit
/// `bytes_per_rank` (0: unknown).
struct GridChoice {
  int stages = 0, replicas = 0;
};
struct StageCost {
  double time;           ///< of the most expensive stage, any unit
  int64_t weight_bytes;  ///< of the largest stage
};
/// cost_of_stages[s − 1] describes a split into s stages. A stage count above cost_of_stages.size() is not
/// possible. Returns {0, 0} when nothing fits.
[[nodiscard]] GridChoice choose_grid(int n_ranks, int64_t n_microbatches,
                                     const std::vector<StageCost>& cost_of_stages, int64_t bytes_per_rank);

/// The grid of a run: the configuration's stages and replicas, by choose_grid where both are auto. Sets
/// config.residency from auto to resident, or to streamed where a stage's weights exceed `bytes_per_rank` (0:
/// unknown). cost_of_stages: with resident weights.
///
/// Throws   ConfigError when stages x replicas is not n_ranks, and when residency is resident and nothing
/// fits.
[[nodiscard]] comm::GridShape choose_shape(config::RunConfig& config,
                                           const std::vector<StageCost>& cost_of_stages,
                                           int64_t n_microbatches, int n_ranks, int64_t bytes_per_rank);

}  // namespace isobath::pipeline
