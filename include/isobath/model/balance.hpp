#pragma once
#include <cstdint>
#include <isobath/core/partition.hpp>
#include <isobath/model/model_config.hpp>
#include <vector>

namespace isobath::model {

/// Cost of one token in multiply-adds: forward and backward pass of a block, its forward pass again where
/// activations were not kept, embedding, head.
struct CostModel {
  double block = 0, recomputation = 0, embedding = 0, head = 0;
};
[[nodiscard]] CostModel cost_of(const ModelConfig& config, int64_t length);

/// What a stage may keep for its backward passes; by default nothing.
struct Activations {
  int64_t n_tokens = 1;      ///< of a microbatch
  int64_t element_size = 4;  ///< bytes
  double limit_gib = 0;
};

/// Blocks whose activations fit the limit for all microbatches in flight on a stage, not recomputed in the
/// backward pass; a stage may have fewer.
[[nodiscard]] int64_t count_kept_blocks(const ModelConfig& config, const Activations& activations,
                                        int64_t in_flight);

/// Cost of one token on a stage of n_blocks, embedding and head at the ends included.
[[nodiscard]] double stage_cost(const ModelConfig& config, const CostModel& cost,
                                const Activations& activations, int stage, int n_stages, int64_t n_blocks);

/// Contiguous block ranges for `n_stages`, minimising the most expensive stage; embedding counts to the
/// first, head to the last; the first stages have most microbatches in flight and keep fewest activations.
/// Each stage holds at least one block. Throws ConfigError when n_stages > n_blocks (says both numbers).
[[nodiscard]] std::vector<Range> balance_stages(const ModelConfig& config, int64_t length, int n_stages,
                                                const Activations& activations = {});

/// Whole logical shards that a replica runs between two drains of its pipeline, when ranks look for a stop
/// request: about 32 microbatches a stage, so that the drain costs (stages − 1) / (32 · stages) < 1/32 of a
/// segment; 8 microbatches with one stage, which drains nothing.
[[nodiscard]] int64_t shards_per_segment(int64_t n_microbatches, int64_t n_shards, int64_t n_stages);

}  // namespace isobath::model
