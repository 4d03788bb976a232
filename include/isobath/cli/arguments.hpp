#pragma once
#include <cstdint>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <string>
#include <variant>
#include <vector>

namespace isobath::cli {

enum class Command {
  run,
  measure,
  allocate,
  quantize,
  evaluate,
  diagnose,
  plan,
  inspect,
  compare,
  check,
  version
};

/// What the command line asks for.
struct Arguments {
  Command command = Command::version;
  log::Level level = log::Level::info;
  std::string config_path;               ///< all but inspect, compare and version
  std::vector<std::string> settings;     ///< "key=value" of each --set
  bool resume = false;                   ///< run, measure, quantize
  bool resume_or_start = false;          ///< run, measure, quantize
  std::string trace;                     ///< run, measure, quantize, evaluate: timeline to write
  double budget_bits = 0;                ///< allocate: stored bits a weight; 0: budget_bytes
  int64_t budget_bytes = 0;              ///< allocate
  std::string method = "quadratic";      ///< allocate
  bool no_first_order = false;           ///< allocate
  std::string allocation_output;         ///< allocate: file to write; empty: in the run directory
  std::vector<std::string> checkpoints;  ///< evaluate, diagnose: instead of the run directory's
  bool original_only = false;            ///< evaluate
  std::string json_output;               ///< evaluate, plan, diagnose: file to write
  std::string tokens;                    ///< diagnose: token file of the probe set
  int64_t sequences = 4;                 ///< diagnose
  int64_t samples = 4;                   ///< diagnose: label draws a token
  int64_t modules = 0;                   ///< diagnose: linears measured; 0: all
  bool only_blocks = false;              ///< diagnose
  std::string cluster;                   ///< plan: cluster description
  std::string model_config;              ///< plan: config.json or its directory instead of the model's
  bool calibrates = false;               ///< plan: measures this machine instead
  std::string cluster_output;            ///< plan --calibrate: file to write
  std::string statistics;                ///< inspect, compare: file or directory
  std::string other_statistics;          ///< compare: the second
  int64_t top = 20;                      ///< inspect, compare, diagnose: rows of the table
  bool as_json = false;                  ///< inspect, compare
  std::string granularity = "module";    ///< inspect: weight | channel | module | block
  std::string model;                     ///< inspect: of single weights, the model that was measured
  int n_ranks = 0;                       ///< check; 0: as many as run now. plan; 0: all of the cluster
  bool shows_keys = false;               ///< check: prints the reference of all keys and ends
  bool shows_schema = false;             ///< check: prints the JSON schema and ends
};

/// Text to print instead of a command: help (ok) or a usage error (config).
struct Usage {
  ExitCode code;
  std::string text;
};

/// Reads the command line. A pure function: all ranks come to the same result.
[[nodiscard]] std::variant<Arguments, Usage> parse_arguments(int argc, const char* const* argv);

}  // namespace isobath::cli
