#pragma once
#include <yaml-cpp/yaml.h>

#include <functional>
#include <isobath/config/run_config.hpp>
#include <isobath/config/schema.hpp>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace isobath::config {

/// A value that a key does not take; the parser adds source, line and key.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A key with all that is done with it: parsing, printing, documentation and schema come from this one table.
struct Key {
  KeyInfo info;
  nlohmann::ordered_json schema;                              ///< JSON schema of the value
  std::function<void(RunConfig&, const YAML::Node&)> assign;  ///< throws Mismatch
  std::function<std::string(const RunConfig&)> text;          ///< the value as YAML; `assign` reads it back
};
[[nodiscard]] const std::vector<Key>& key_table();

/// What stands in a node, for messages: `"64"`, `a list`, `a map`, `nothing`.
[[nodiscard]] std::string found_text(const YAML::Node& node);

/// Readers of single values; throw Mismatch.
[[nodiscard]] std::string read_text(const YAML::Node& node);
[[nodiscard]] int read_bits(const YAML::Node& node);
/// Distinct widths in ascending order, or an empty list.
[[nodiscard]] std::vector<int> read_widths(const YAML::Node& node);
[[nodiscard]] int64_t read_group(const YAML::Node& node);
[[nodiscard]] std::vector<std::string> read_paths(const YAML::Node& node);
[[nodiscard]] std::vector<std::string> read_patterns(const YAML::Node& node);
[[nodiscard]] std::vector<Override> read_overrides(const YAML::Node& node);

/// Text as YAML reads it back: bare where that is the same text, else in double quotes.
[[nodiscard]] std::string quoted_if_needed(const std::string& text);

/// Splits "a | b" lists of words for messages.
[[nodiscard]] std::string joined(const std::vector<std::string>& words, const std::string& separator);

}  // namespace isobath::config
