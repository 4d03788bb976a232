#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/model/block.hpp>
#include <limits>

namespace isobath::model {

CostModel cost_of(const ModelConfig& config, int64_t length) {
  double linear = 0;
  for (int p = 0; p < kProjections; ++p) {
    const ModuleShape shape = module_shape(config, static_cast<Projection>(p));
    linear += static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
  }
  const auto d_query = static_cast<double>(config.n_heads) * static_cast<double>(config.head_dim);
  // Scores and mixed values over the causal half of the positions.
  const double attention = d_query * static_cast<double>(length);
  const auto d_model = static_cast<double>(config.d_model);
  // Forward and backward: one product more for a frozen linear (∂L/∂x only), four for attention's two. The
  // head keeps its activations.
  return {.block = 2 * linear + 3 * attention,
          .recomputation = linear + attention,
          .embedding = d_model,
          .head = 2 * static_cast<double>(config.vocab_size) * d_model};
}

double stage_cost(const ModelConfig& config, const CostModel& cost, const Activations& activations, int stage,
                  int n_stages, int64_t n_blocks) {
  const int64_t n_kept = count_kept_blocks(config, activations, n_stages - stage);
  return static_cast<double>(n_blocks) * cost.block +
         static_cast<double>(std::max<int64_t>(0, n_blocks - n_kept)) * cost.recomputation +
         (stage == 0 ? cost.embedding : 0) + (stage + 1 == n_stages ? cost.head : 0);
}

std::vector<Range> balance_stages(const ModelConfig& config, int64_t length, int n_stages,
                                  const Activations& activations) {
  ISOBATH_CHECK(n_stages >= 1, "{} stages", n_stages);
  const int64_t n_blocks = config.n_blocks;
  if (n_stages > n_blocks) {
    fail<ConfigError>(
        "ranks.stages: {} pipeline stages for a model of {} blocks; every stage needs at least one block, so "
        "use "
        "at most {} stages and more replicas",
        n_stages, n_blocks, n_blocks);
  }
  // A block more costs a stage more: giving each to the stage that it leaves cheapest minimises the maximum.
  const CostModel cost = cost_of(config, length);
  std::vector<int64_t> sizes(static_cast<size_t>(n_stages), 1);
  for (int64_t n_dealt = n_stages; n_dealt < n_blocks; ++n_dealt) {
    size_t cheapest = 0;
    double least = std::numeric_limits<double>::infinity();
    for (size_t stage = 0; stage < sizes.size(); ++stage) {
      const double then =
          stage_cost(config, cost, activations, static_cast<int>(stage), n_stages, sizes[stage] + 1);
      if (then >= least) continue;
      least = then;
      cheapest = stage;
    }
    ++sizes[cheapest];
  }
  std::vector<Range> stages;
  for (const int64_t size : sizes) {
    const int64_t begin = stages.empty() ? 0 : stages.back().end;
    stages.push_back({begin, begin + size});
  }
  return stages;
}

int64_t shards_per_segment(int64_t n_microbatches, int64_t n_shards, int64_t n_stages) {
  // One stage has nothing to drain.
  const int64_t per_stage = n_stages > 1 ? 32 : 8;
  const int64_t microbatches_per_shard = std::max<int64_t>(1, n_microbatches / n_shards);
  return std::max<int64_t>(1, per_stage * n_stages / microbatches_per_shard);
}

int64_t count_kept_blocks(const ModelConfig& config, const Activations& activations, int64_t in_flight) {
  const int64_t bytes = in_flight * activation_bytes(config, activations.n_tokens, activations.element_size);
  return static_cast<int64_t>(activations.limit_gib * 0x1p30 / static_cast<double>(bytes));
}

}  // namespace isobath::model
