#include <isobath/pipeline/schedule.hpp>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <limits>

namespace isobath::pipeline {

std::vector<Step> one_forward_one_backward(int64_t n_microbatches, int position, int n_stages) {
  ISOBATH_CHECK(0 <= position && position < n_stages, "stage {} of {}", position, n_stages);
  std::vector<Step> steps;
  const int64_t n_warm = std::min<int64_t>(n_stages - 1 - position, n_microbatches);
  for (int64_t i = 0; i < n_warm; ++i) steps.push_back({Step::Kind::forward, i});
  for (int64_t i = 0; i < n_microbatches; ++i) {
    if (n_warm + i < n_microbatches) steps.push_back({Step::Kind::forward, n_warm + i});
    steps.push_back({Step::Kind::backward, i});
  }
  return steps;
}

GridChoice choose_grid(int n_ranks, int64_t n_microbatches, const std::vector<StageCost>& cost_of_stages,
                       int64_t bytes_per_rank) {
  GridChoice best;
  double best_time = std::numeric_limits<double>::infinity();
  for (int stages = 1; stages <= std::min<int>(n_ranks, static_cast<int>(cost_of_stages.size())); ++stages) {
    if (n_ranks % stages != 0) continue;
    const StageCost& cost = cost_of_stages[static_cast<size_t>(stages - 1)];
    if (bytes_per_rank > 0 && cost.weight_bytes > bytes_per_rank) continue;
    const int replicas = n_ranks / stages;
    const int64_t n_local = (n_microbatches + replicas - 1) / replicas;
    const double time = cost.time * static_cast<double>(n_local + stages - 1);
    if (time < best_time) {
      best_time = time;
      best = {stages, replicas};
    }
  }
  return best;
}

}  // namespace isobath::pipeline
