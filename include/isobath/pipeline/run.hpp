#pragma once
#include <filesystem>
#include <isobath/comm/communicator.hpp>
#include <isobath/config/run_config.hpp>
#include <string>
#include <vector>

namespace isobath::pipeline {

enum class Stage { measure, quantize, evaluate };

/// Runs the named stages in the run directory `config.output` and prints the closing table.
///
/// Collective over `world`. The first stage creates the directory (all stages, or measure) or continues in
/// the one the stage before left. `resume` continues an interrupted run. Throws StopRequested on every rank
/// after SIGUSR1/SIGTERM, once the state is on disk.
void run(const config::RunConfig& config, const std::vector<Stage>& stages, bool resume,
         const comm::Communicator& world);

/// Evaluates config.model, and each of `quantized` against it, without a run directory; prints the table and,
/// when `json_output` is not empty, writes it there: an object, or a list of them for several checkpoints.
/// Collective over `world`.
void evaluate_checkpoints(const config::RunConfig& config,
                          const std::vector<std::filesystem::path>& quantized,
                          const std::filesystem::path& json_output, const comm::Communicator& world);

/// What `check` finds without a job and without reading weights: problems (empty: none) and a description of
/// the run.
struct CheckResult {
  std::vector<std::string> problems;
  std::string summary;
};
[[nodiscard]] CheckResult check(const config::RunConfig& config, int n_ranks);

}  // namespace isobath::pipeline
