#pragma once
#include <isobath/plan/job.hpp>
#include <string>
#include <utility>
#include <vector>

namespace isobath::plan {

/// Predicted wall-clock time of one stage of a run, by what the slowest rank does.
struct StageTime {
  std::string name;
  double compute_s = 0;
  double idle_s = 0;           ///< filling and draining the pipeline
  double communication_s = 0;  ///< transfers, counted whole: MPI moves large messages inside the wait
  double disk_s = 0;
  std::vector<std::pair<std::string, double>> parts = {};  ///< the same time by step; quantize only

  [[nodiscard]] double total_s() const { return compute_s + idle_s + communication_s + disk_s; }
};

/// Reading the checkpoint: each replica reads all of it.
[[nodiscard]] StageTime load_time(const Job& job);

/// One backward calibration pass over blocks [first_block, n): for each segment
/// (microbatches + stages − 1) × the slowest stage's forward and backward; then D to replica 0 and to disk.
/// Over all blocks and with row groups by cluster also the pass that finds them, without k-means.
///
/// Source   1F1B: Narayanan et al. (SC21), §2.2.1.
[[nodiscard]] StageTime measure_time(const Job& job, int64_t first_block = 0);

/// The pass over all blocks, with re-estimation as `reestimate` says (not as the configuration does); policy
/// drift at its most expensive. The forward pass of loss kl is left out.
[[nodiscard]] StageTime quantize_time(const Job& job, const config::Reestimate& reestimate);

/// Tuning of scales: the original model's forward pass, then in each step forward and backward of its part of
/// the sequences, for which the pipeline fills and drains, and the gradients of scales.
[[nodiscard]] StageTime tune_time(const Job& job);

/// Loading the quantized checkpoint and running both models over the windows.
[[nodiscard]] StageTime evaluate_time(const Job& job);

}  // namespace isobath::plan
