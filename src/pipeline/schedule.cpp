#include <isobath/pipeline/schedule.hpp>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
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

comm::GridShape choose_shape(config::RunConfig& config, const std::vector<StageCost>& cost_of_stages,
                             int64_t n_microbatches, int n_ranks, int64_t bytes_per_rank) {
  const config::Ranks& ranks = config.ranks;
  int stages = ranks.stages, replicas = ranks.replicas;
  const auto stream = [&](int64_t needed) {
    log::info(
        "residency: streamed; a rank's share of the weights, {:.1f} GiB, exceeds the {:.1f} GiB that it has "
        "for them",
        static_cast<double>(needed) / (1 << 30), static_cast<double>(bytes_per_rank) / (1 << 30));
    config.residency = "streamed";
  };
  // Steps of tuning pass through the whole model: its weights stay.
  if (config.residency == "auto" && config.quantization.tuning.epochs > 0) config.residency = "resident";
  if (stages == 0 && replicas == 0 && config.residency != "streamed") {
    const GridChoice choice = choose_grid(n_ranks, n_microbatches, cost_of_stages, bytes_per_rank);
    if (choice.stages == 0 && config.residency == "resident")
      fail<ConfigError>(
          "the model's weights do not fit {} ranks with {:.1f} GiB for weights each; use more nodes, or "
          "residency: streamed, which reads each block when its turn comes",
          n_ranks, static_cast<double>(bytes_per_rank) / (1 << 30));
    if (choice.stages == 0) stream(cost_of_stages.back().weight_bytes);
    stages = choice.stages;
    replicas = choice.replicas;
  }
  // With streamed weights one stage works at a time: all ranks are to be in it.
  if (stages == 0 && config.residency == "streamed") stages = 1;
  if (stages == 0) stages = n_ranks / replicas;
  if (replicas == 0) replicas = n_ranks / stages;
  if (stages * replicas != n_ranks) {
    const auto configured = [](int n) { return n == 0 ? std::string("auto") : std::to_string(n); };
    fail<ConfigError>(
        "ranks.stages = {} times ranks.replicas = {} must equal the {} of this job; set one of them to auto, "
        "or start it with mpirun -n {}",
        configured(ranks.stages), configured(ranks.replicas),
        n_ranks == 1 ? "1 rank" : fmt::format("{} ranks", n_ranks),
        std::max(1, stages) * std::max(1, replicas));
  }
  if (config.residency == "auto" && stages <= std::ssize(cost_of_stages)) {
    const int64_t needed = cost_of_stages[static_cast<size_t>(stages - 1)].weight_bytes;
    if (bytes_per_rank > 0 && needed > bytes_per_rank) stream(needed);
  }
  if (config.residency == "auto") config.residency = "resident";
  return {stages, replicas};
}

}  // namespace isobath::pipeline
