#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <tuple>

namespace isobath::formats::compressed_tensors {

using nlohmann::ordered_json;

static constexpr const char* kRegexPrefix = "re:";

static bool is_regex(const std::string& target) {
  return target.starts_with(kRegexPrefix);
}

/// Python's re.match: anchored at the start, not at the end.
static bool matches_regex(const std::string& target, const std::string& module) {
  const std::regex pattern(target.substr(std::string_view(kRegexPrefix).size()), std::regex::ECMAScript);
  return std::regex_search(module, pattern, std::regex_constants::match_continuous);
}

/// The error of a config.json value this reader does not decode.
[[noreturn]] static void unsupported(const std::filesystem::path& file, const std::string& key,
                                     const std::string& found, const std::string& supported) {
  fail<DataError>("{}: quantization_config {} is {}, supported: {}; use the original checkpoint instead",
                  file.string(), key, found, supported);
}

static void require(const std::filesystem::path& file, const ordered_json& object, const std::string& key,
                    const std::vector<std::string>& allowed) {
  const auto value = object.find(key);
  const std::string found = value == object.end() || value->is_null() ? "null"
                            : value->is_string()                      ? value->get<std::string>()
                                                                      : value->dump();
  if (std::find(allowed.begin(), allowed.end(), found) == allowed.end()) {
    unsupported(file, key, found, fmt::format("{}", fmt::join(allowed, ", ")));
  }
}

static Scheme read_scheme(const std::filesystem::path& file, const std::string& group,
                          const ordered_json& weights) {
  require(file, weights, "type", {"int", "null"});
  require(file, weights, "strategy", {"group", "channel"});
  require(file, weights, "actorder", {"null", "weight", "static", "false"});
  const int bits = weights.at("num_bits").get<int>();
  if (bits < 2 || bits > 8 || bits == 7)
    unsupported(file, group + " num_bits", std::to_string(bits), "2, 3, 4, 5, 6, 8");
  const bool per_channel = weights.at("strategy") == "channel";
  const int64_t width = per_channel ? 0 : weights.at("group_size").get<int64_t>();
  if (!per_channel && width <= 0)
    unsupported(file, group + " group_size", std::to_string(width), "a positive number");
  return {bits, width, weights.value("symmetric", true)};
}

SchemeTable::SchemeTable(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / "config.json";
  std::ifstream stream(file);
  if (!stream) fail<DataError>("cannot read {}; a checkpoint directory holds its config.json", file.string());
  try {
    const auto config = ordered_json::parse(stream);
    const auto quantization = config.find("quantization_config");
    if (quantization == config.end() || quantization->is_null()) return;
    require(file, *quantization, "quant_method", {"compressed-tensors"});
    require(file, *quantization, "format", {"pack-quantized"});
    for (const auto& [name, group] : quantization->at("config_groups").items()) {
      require(file, group, "format", {"pack-quantized", "null"});
      require(file, group, "input_activations", {"null"});
      groups_.push_back({group.at("targets").get<std::vector<std::string>>(),
                         read_scheme(file, name, group.at("weights"))});
    }
    if (const auto ignore = quantization->find("ignore");
        ignore != quantization->end() && !ignore->is_null()) {
      ignored_ = ignore->get<std::vector<std::string>>();
    }
    for (const auto& group : groups_) {
      for (const auto& target : group.targets) {
        if (is_regex(target)) (void)matches_regex(target, "");
      }
    }
  } catch (const nlohmann::json::exception& error) {
    fail<DataError>("{}: quantization_config is malformed: {}", file.string(), error.what());
  } catch (const std::regex_error& error) {
    fail<DataError>("{}: a regular expression of quantization_config cannot be read: {}", file.string(),
                    error.what());
  }
}

bool SchemeTable::empty() const {
  return groups_.empty();
}

const Scheme* SchemeTable::find(const std::string& module) const {
  const auto names = [&](const std::string& target) { return target == module; };
  const auto matches = [&](const std::string& target) {
    return is_regex(target) && matches_regex(target, module);
  };
  const auto class_name = [](const std::string& target) { return target == "Linear"; };
  if (std::any_of(ignored_.begin(), ignored_.end(), names) ||
      std::any_of(ignored_.begin(), ignored_.end(), matches)) {
    return nullptr;
  }
  // compressed-tensors' order: exact names win over patterns, patterns over the class.
  for (const std::function<bool(const std::string&)>& rule :
       {std::function<bool(const std::string&)>(names), std::function<bool(const std::string&)>(matches),
        std::function<bool(const std::string&)>(class_name)}) {
    for (const Group& group : groups_) {
      if (std::any_of(group.targets.begin(), group.targets.end(), rule)) return &group.scheme;
    }
  }
  return nullptr;
}

static ordered_json weights_of(const quant::GridSpec& spec) {
  ordered_json weights;
  weights["num_bits"] = spec.bits;
  weights["type"] = "int";
  weights["symmetric"] = spec.symmetric;
  weights["strategy"] = spec.group == 0 ? "channel" : "group";
  weights["group_size"] = spec.group == 0 ? ordered_json(nullptr) : ordered_json(spec.group);
  weights["dynamic"] = false;
  weights["actorder"] = nullptr;
  weights["block_structure"] = nullptr;
  weights["observer"] = "minmax";
  weights["observer_kwargs"] = ordered_json::object();
  return weights;
}

std::string config_json(const std::string& original_config_json,
                        const std::map<std::string, quant::GridSpec>& modules,
                        const std::vector<std::string>& ignore, const std::string& provenance) {
  ISOBATH_CHECK(!modules.empty(), "a quantized checkpoint has at least one quantized module");
  using Key = std::tuple<int, int64_t, bool>;
  std::map<Key, std::vector<std::string>> members;
  for (const auto& [module, spec] : modules)
    members[{spec.bits, spec.group, spec.symmetric}].push_back(module);

  ordered_json groups = ordered_json::object();
  for (const auto& [key, names] : members) {
    ordered_json group;
    group["targets"] = members.size() == 1 ? std::vector<std::string>{"Linear"} : names;
    group["weights"] = weights_of(modules.at(names.front()));
    group["input_activations"] = nullptr;
    group["output_activations"] = nullptr;
    group["format"] = "pack-quantized";
    groups[fmt::format("group_{}", groups.size())] = group;
  }

  ordered_json quantization;
  quantization["quant_method"] = "compressed-tensors";
  quantization["format"] = "pack-quantized";
  quantization["quantization_status"] = "compressed";
  quantization["version"] = "0.20.0";
  quantization["global_compression_ratio"] = nullptr;
  quantization["kv_cache_scheme"] = nullptr;
  quantization["ignore"] = ignore;
  quantization["config_groups"] = groups;
  if (!provenance.empty()) quantization["isobath"] = provenance;
  try {
    auto config = ordered_json::parse(original_config_json);
    config["quantization_config"] = quantization;
    return config.dump(2) + "\n";
  } catch (const nlohmann::json::exception& error) {
    fail<DataError>("the original config.json is malformed: {}", error.what());
  }
}

}  // namespace isobath::formats::compressed_tensors
