#include <isobath/config/allocation_file.hpp>

#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>

#include "key_table.hpp"

namespace isobath::config {
namespace {

constexpr const char* kForm =
    "expected a file of `isobath allocate`, with the keys allocation and overrides; found {}";

}  // namespace

std::string allocation_text(const std::map<std::string, int>& bits,
                            const std::map<std::string, std::string>& provenance) {
  std::string text =
      "# Widths chosen by `isobath allocate`; quantization.allocation takes this file.\nallocation:\n";
  for (const auto& [name, value] : provenance)
    text += fmt::format("  {}: {}\n", name, quoted_if_needed(value));
  text += "overrides:\n";
  for (const auto& [module, width] : bits)
    text += fmt::format("- {{match: {}, bits: {}}}\n", quoted_if_needed(module), width);
  return text;
}

void apply_allocation(RunConfig& config, const std::string& yaml, const std::string& source) {
  Allocation allocation;
  try {
    const YAML::Node root = YAML::Load(yaml);
    const bool has_both = root.IsMap() && root.size() == 2 && root["allocation"].IsDefined() &&
                          root["allocation"].IsMap() && root["overrides"].IsDefined();
    if (!has_both) throw Mismatch(fmt::format(kForm, root.IsMap() ? "other keys" : found_text(root)));
    for (const auto& entry : root["allocation"])
      allocation.provenance[entry.first.Scalar()] = entry.second.Scalar();
    for (const Override& entry : read_overrides(root["overrides"])) {
      if (entry.match.starts_with("re:") || entry.bits == 0 || entry.group >= 0)
        throw Mismatch(
            fmt::format("expected entries with a whole module name and bits, found one for \"{}\" {}",
                        entry.match, entry.bits == 0 ? "without bits" : "that is more than that"));
      if (!allocation.bits.emplace(entry.match, entry.bits).second)
        throw Mismatch(fmt::format("\"{}\" stands twice", entry.match));
    }
  } catch (const YAML::Exception& error) {
    fail<ConfigError>("quantization.allocation: {} is not valid YAML: {}", source, error.what());
  } catch (const Mismatch& problem) {
    fail<ConfigError>("quantization.allocation: {}: {}", source, problem.what());
  }
  Digest digest;
  allocation.digest = digest.update(yaml).hex();
  config.quantization.allocated = std::move(allocation);
}

}  // namespace isobath::config
