#pragma once
#include <cstdint>
#include <isobath/core/partition.hpp>
#include <isobath/model/model_config.hpp>
#include <vector>

namespace isobath::model {

/// Cost of one token in multiply-adds of forward + backward: one entry a block, embedding and head
/// separately.
struct CostModel {
  double block = 0, embedding = 0, head = 0;
};
[[nodiscard]] CostModel cost_of(const ModelConfig& config, int64_t length);

/// Contiguous block ranges for `n_stages`, minimising the most expensive stage; embedding counts to the
/// first, head to the last; each stage holds at least one block. Throws ConfigError when n_stages > n_blocks
/// (says both numbers).
[[nodiscard]] std::vector<Range> balance_stages(const ModelConfig& config, int64_t length, int n_stages);

/// Whole logical shards that a replica runs between two drains of its pipeline, when ranks look for a stop
/// request: about 32 microbatches a stage, so that the drain costs (stages − 1) / (32 · stages) < 1/32 of a
/// segment; 8 microbatches with one stage, which drains nothing.
[[nodiscard]] int64_t shards_per_segment(int64_t n_microbatches, int64_t n_shards, int64_t n_stages);

/// Blocks whose activations fit `limit_gib` for all microbatches of n_tokens in flight, not recomputed in the
/// backward pass; a stage may have fewer.
[[nodiscard]] int64_t count_kept_blocks(const ModelConfig& config, int64_t n_tokens, int64_t element_size,
                                        int64_t in_flight, double limit_gib);

}  // namespace isobath::model
