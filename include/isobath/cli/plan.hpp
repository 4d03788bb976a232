#pragma once
#include <isobath/plan/plan.hpp>
#include <string>
#include <vector>

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

/// Where `config` came from, as the command line said it.
struct ConfigSource {
  std::string path;
  std::vector<std::string> settings = {};  ///< "key=value" of each --set
};

/// The plan for a terminal: time and memory in short, the command that runs it, and tables.
[[nodiscard]] std::string plan_text(const config::RunConfig& config, const plan::Plan& plan,
                                    const ConfigSource& source);

/// The plan as one JSON object; bytes and seconds.
[[nodiscard]] std::string plan_json(const config::RunConfig& config, const plan::Plan& plan);

}  // namespace isobath::cli
