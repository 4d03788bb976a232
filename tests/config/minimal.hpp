#pragma once
#include <isobath/config/run_config.hpp>
#include <isobath/core/error.hpp>
#include <string>
#include <vector>

namespace isobath::config {

/// The keys that every configuration must give, on three lines.
inline const std::string kMinimal = "model: m\noutput: o\ncalibration: {tokens: t}\n";

/// Message of the ConfigError that `yaml` and `settings` end in; empty when they are accepted.
inline std::string problem_of(const std::string& yaml, const std::vector<std::string>& settings = {}) {
  try {
    (void)parse(yaml, settings, "run.yaml");
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

}  // namespace isobath::config
