#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/model/block.hpp>
#include <utility>

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
  // Forward, its recomputation in the backward, and the backward: one product for a frozen linear (∂L/∂x
  // only), four for attention's two. The head keeps its activations, so it runs forward once.
  return {.block = 3 * linear + 4 * attention,
          .embedding = d_model,
          .head = 2 * static_cast<double>(config.vocab_size) * d_model};
}

std::vector<Range> balance_stages(const ModelConfig& config, int64_t length, int n_stages) {
  ISOBATH_CHECK(n_stages >= 1, "{} stages", n_stages);
  const int64_t n_blocks = config.n_blocks;
  if (n_stages > n_blocks) {
    fail<ConfigError>(
        "ranks.stages: {} pipeline stages for a model of {} blocks; every stage needs at least one block, so "
        "use "
        "at most {} stages and more replicas",
        n_stages, n_blocks, n_blocks);
  }
  if (n_stages == 1) return {{0, n_blocks}};

  const CostModel cost = cost_of(config, length);
  const int64_t n_middle_stages = n_stages - 2;
  // Blocks cost the same, so the sizes of the first and the last stage decide everything: the stages between
  // share the rest as evenly as they can. All pairs are tried; of equal maxima the smallest sum of squares is
  // the most even.
  std::pair<double, double> best{};
  int64_t best_first = 0, best_last = 0;
  for (int64_t first = 1; first <= n_blocks - n_stages + 1; ++first) {
    for (int64_t last = 1; last <= n_blocks - n_middle_stages - first; ++last) {
      const int64_t n_middle = n_blocks - first - last;
      if (n_middle_stages == 0 && n_middle != 0) continue;
      const double first_cost = static_cast<double>(first) * cost.block + cost.embedding;
      const double last_cost = static_cast<double>(last) * cost.block + cost.head;
      std::pair<double, double> candidate{std::max(first_cost, last_cost),
                                          first_cost * first_cost + last_cost * last_cost};
      for (int64_t stage = 0; stage < n_middle_stages; ++stage) {
        const double middle_cost =
            static_cast<double>(partition(n_middle, n_middle_stages, stage).size()) * cost.block;
        candidate.first = std::max(candidate.first, middle_cost);
        candidate.second += middle_cost * middle_cost;
      }
      if (best_first == 0 || candidate < best) {
        best = candidate;
        best_first = first;
        best_last = last;
      }
    }
  }

  std::vector<Range> stages{{0, best_first}};
  for (int64_t stage = 0; stage < n_middle_stages; ++stage) {
    const Range share = partition(n_blocks - best_first - best_last, n_middle_stages, stage);
    stages.push_back({best_first + share.begin, best_first + share.end});
  }
  stages.push_back({n_blocks - best_last, n_blocks});
  return stages;
}

int64_t shards_per_segment(int64_t n_microbatches, int64_t n_shards, int64_t n_stages) {
  // One stage has nothing to drain.
  const int64_t per_stage = n_stages > 1 ? 32 : 8;
  const int64_t microbatches_per_shard = std::max<int64_t>(1, n_microbatches / n_shards);
  return std::max<int64_t>(1, per_stage * n_stages / microbatches_per_shard);
}

int64_t count_kept_blocks(const ModelConfig& config, int64_t n_tokens, int64_t element_size,
                          int64_t in_flight, double limit_gib) {
  const int64_t bytes = in_flight * activation_bytes(config, n_tokens, element_size);
  return static_cast<int64_t>(limit_gib * 0x1p30 / static_cast<double>(bytes));
}

}  // namespace isobath::model
