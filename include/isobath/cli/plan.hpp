#pragma once
#include <isobath/plan/plan.hpp>
#include <string>

namespace isobath::cli {

struct PlanRequest {
  std::string cluster;       ///< file; empty: the configuration's plan.cluster
  std::string model_config;  ///< config.json or its directory; empty: the configuration's model
  int64_t n_ranks = 0;       ///< 0: all of the cluster
};

/// Reads the cluster and config.json (no weights) and plans the run.
///
/// Throws   ConfigError: no cluster named, a bad description, a run that does not fit; DataError:
/// config.json.
[[nodiscard]] plan::Plan plan_run(const config::RunConfig& config, const PlanRequest& request);

/// The plan as tables for a terminal.
[[nodiscard]] std::string plan_text(const config::RunConfig& config, const plan::Plan& plan);

/// The plan as one JSON object; bytes and seconds.
[[nodiscard]] std::string plan_json(const config::RunConfig& config, const plan::Plan& plan);

}  // namespace isobath::cli
