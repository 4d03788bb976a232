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

}  // namespace isobath::model
