#pragma once
#include <string>
#include <vector>

namespace isobath::config {

/// One key of the configuration: the single source of defaults, units and documentation.
struct KeyInfo {
  std::string key;           ///< dotted
  std::string type;          ///< "integer", "one of: nll | fisher", …
  std::string default_text;  ///< as YAML; empty for empty text
  std::string unit;
  std::string description;
  bool is_required = false;
};
[[nodiscard]] const std::vector<KeyInfo>& all_keys();
/// The known key nearest to `unknown` by edit distance, or the only one of the same last part; empty when
/// none is near.
[[nodiscard]] std::string nearest_key(const std::string& unknown, const std::vector<std::string>& known);
/// JSON schema text of configs/schema.json.
[[nodiscard]] std::string json_schema();
/// The tables of docs/configuration.md, one a section.
[[nodiscard]] std::string keys_markdown();

}  // namespace isobath::config
