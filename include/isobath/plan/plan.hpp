#pragma once
#include <isobath/plan/memory.hpp>
#include <isobath/plan/time.hpp>
#include <optional>
#include <string>
#include <vector>

namespace isobath::plan {

/// Bytes on disk in the run directory and beside it.
struct DiskNeed {
  double checkpoint_bytes = 0;    ///< read: the original model
  double statistics_bytes = 0;    ///< measure/, without re-estimations
  double restatistics_bytes = 0;  ///< of each re-estimation of the configuration
  double generation_bytes = 0;    ///< one saved state; checkpoint.keep of them and one in the making
  double keep = 0;
  double model_bytes = 0;    ///< the quantized checkpoint, twice where scales are tuned
  double scratch_bytes = 0;  ///< of a node, in scratch.directory while D is measured; not in written_bytes
  [[nodiscard]] double written_bytes() const {
    return statistics_bytes + restatistics_bytes + (keep + 1) * generation_bytes + model_bytes;
  }
};

/// What a run would cost on a cluster.
struct Plan {
  Cluster cluster;
  int stages = 1, replicas = 1;
  std::string residency = "resident";  ///< resident | streamed
  bool computes_bf16 = true;
  std::vector<Range> blocks = {};  ///< of each stage
  int64_t segments = 1;
  int64_t proposed_microbatch = 1;  ///< the configuration's, unless another saves 5 % of the run
  /// By stage of the pipeline; empty where the run has no such stage.
  std::vector<RankMemory> measure_memory = {}, quantize_memory = {}, reestimation_memory = {},
                          tune_memory = {}, evaluate_memory = {};
  MemoryNeed need = {};
  StageTime load = {};
  std::optional<StageTime> measure = {}, tune = {}, evaluate = {};
  struct Policy {
    std::string name;  ///< "never", "every 8 blocks"
    bool is_configured;
    StageTime time;
  };
  std::vector<Policy> quantize = {};  ///< the configured policy, never, every 8 blocks, every block
  DiskNeed disk = {};
  std::vector<std::string> advice = {};

  [[nodiscard]] const StageTime& configured_quantize() const;
  [[nodiscard]] double total_s() const;  ///< with the configured policy
};

/// Plans the run on all ranks of the cluster. Grid: the configuration's stages and replicas; what is auto
/// there is chosen to be fastest of what fits. Residency auto streams weights only where resident ones do not
/// fit.
///
/// Throws   ConfigError when the grid is impossible, when a covariance is too wide to hold, or when nothing
/// fits: with the bytes that are missing, the settings and the smallest number of nodes of this kind, or the
/// memory on these ranks, that would do.
[[nodiscard]] Plan make_plan(const config::RunConfig& config, const model::ModelConfig& model,
                             const Cluster& cluster);

/// A line for each linear whose covariance is too wide for what needs it whole on one rank (gptaq,
/// act-order); empty when there is none, or nothing needs it.
[[nodiscard]] std::string too_wide_to_hold(const config::RunConfig& config, const model::ModelConfig& model);

/// The cost of the run on one given grid, whether it fits or not; for comparing with a run that took place.
[[nodiscard]] Plan plan_of(const config::RunConfig& config, const model::ModelConfig& model,
                           const Cluster& cluster, int stages, int replicas);

/// The fewest nodes of the cluster's kind on which the run fits; 0 when none up to `most` do.
[[nodiscard]] int64_t smallest_cluster(const config::RunConfig& config, const model::ModelConfig& model,
                                       const Cluster& cluster, int64_t most);

}  // namespace isobath::plan
