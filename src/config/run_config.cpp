#include <isobath/config/run_config.hpp>

#include <isobath/core/error.hpp>
#include <map>
#include <regex>

#include "key_table.hpp"

namespace isobath::config {
namespace {

/// Deepest nesting of a key's sections; what lies deeper in an unknown section is not listed key by key.
constexpr int kMaxDepth = 3;

const Key* find_key(const std::string& name) {
  for (const Key& key : key_table())
    if (key.info.key == name) return &key;
  return nullptr;
}

bool is_section(const std::string& name) {
  return name.empty() || std::any_of(key_table().begin(), key_table().end(),
                                     [&](const Key& key) { return key.info.key.starts_with(name + "."); });
}

std::vector<std::string> known_names() {
  std::vector<std::string> names;
  for (const Key& key : key_table()) names.push_back(key.info.key);
  return names;
}

/// One pass over a document and the settings of the command line; gathers every problem before it gives up.
class Parser {
 public:
  explicit Parser(std::string source) : source_(std::move(source)) {}

  void document(const std::string& yaml) {
    load(yaml, source_, [&](const YAML::Node& root) { walk("", root, 0); });
  }

  void setting(const std::string& text) {
    const size_t equals = text.find('=');
    const std::string key = text.substr(0, equals);
    if (equals == std::string::npos || key.empty()) {
      report("--set", fmt::format("expected key=value, found \"{}\"", text));
      return;
    }
    setting_ = "--set " + key;
    load(text.substr(equals + 1), setting_, [&](const YAML::Node& value) { walk(key, value, 0); });
    setting_.clear();
  }

  void check_across_keys() {
    for (const Key& key : key_table())
      if (is_read_ && key.info.is_required && !places_.contains(key.info.key))
        report(source_, fmt::format("missing key \"{}\" (required): {}", key.info.key, key.info.description));
    if (config_.sensitivity.samples > 1 && config_.sensitivity.loss != "fisher")
      report(place("sensitivity.samples"),
             fmt::format("sensitivity.samples: expected 1 with sensitivity.loss {}, found {}; the data have "
                         "one label per "
                         "token, use loss fisher to draw several",
                         config_.sensitivity.loss, config_.sensitivity.samples));
    const Sensitivity& sensitivity = config_.sensitivity;
    if (!sensitivity.gram_checkpoints.empty() &&
        sensitivity.gram_checkpoints.size() != sensitivity.gram_bits.size())
      report(place("sensitivity.gram.checkpoints"),
             fmt::format(
                 "sensitivity.gram.checkpoints: expected one a width of sensitivity.gram.bits, found {} of "
                 "{} widths",
                 sensitivity.gram_checkpoints.size(), sensitivity.gram_bits.size()));
    if (!config_.model.empty() && config_.model == config_.output)
      report(place("output"),
             "output: expected another directory than model, found the same; results never replace the "
             "original");
  }

  [[nodiscard]] RunConfig finish() {
    if (!problems_.empty()) throw ConfigError(joined(problems_, "\n"));
    return config_;
  }

 private:
  void load(const std::string& yaml, const std::string& name,
            const std::function<void(const YAML::Node&)>& use) {
    try {
      const std::vector<YAML::Node> documents = YAML::LoadAll(yaml);
      if (documents.size() > 1)
        report(name, fmt::format("expected one YAML document, found {}", documents.size()));
      else
        use(documents.empty() ? YAML::Node() : documents[0]);
    } catch (const YAML::Exception& error) {
      const bool has_line = setting_.empty() && !error.mark.is_null();
      if (setting_.empty()) is_read_ = false;
      report(has_line ? fmt::format("{}:{}", name, error.mark.line + 1) : name,
             "not valid YAML: " + error.msg);
    }
  }

  void walk(const std::string& name, const YAML::Node& node, int depth) {
    if (const Key* key = find_key(name)) return assign(*key, node);
    if (!is_section(name)) return report_unknown(name, node, depth);
    if (node.IsNull()) return;
    if (!node.IsMap())
      return report(place_of(node), fmt::format("{}: expected a map of keys, found {}",
                                                name.empty() ? "document" : name, found_text(node)));
    for_each_child(name, node,
                   [&](const std::string& child, const YAML::Node& value) { walk(child, value, depth + 1); });
  }

  void for_each_child(const std::string& name, const YAML::Node& node,
                      const std::function<void(const std::string&, const YAML::Node&)>& use) {
    std::map<std::string, int> first_line;
    for (const auto& entry : node) {
      if (!entry.first.IsScalar()) {
        report(place_of(entry.first), fmt::format("expected a key, found {}", found_text(entry.first)));
        continue;
      }
      const std::string child = name.empty() ? entry.first.Scalar() : name + "." + entry.first.Scalar();
      const int line = entry.first.Mark().line + 1;
      const auto [first, is_new] = first_line.emplace(child, line);
      if (!is_new) {
        report(place_of(entry.first),
               setting_.empty() ? fmt::format("duplicate key \"{}\", first on line {}", child, first->second)
                                : fmt::format("duplicate key \"{}\"", child));
        continue;
      }
      key_line_ = line;
      use(child, entry.second);
    }
  }

  void assign(const Key& key, const YAML::Node& node) {
    const std::string place = place_of_key();
    places_[key.info.key] = place;
    try {
      key.assign(config_, node);
    } catch (const Mismatch& problem) {
      report(place, fmt::format("{}: {}", key.info.key, problem.what()));
    }
  }

  void report_unknown(const std::string& name, const YAML::Node& node, int depth) {
    if (node.IsMap() && node.size() > 0 && depth < kMaxDepth) {
      // A misspelt section: each of its keys names the one meant.
      for_each_child(name, node, [&](const std::string& child, const YAML::Node& value) {
        report_unknown(child, value, depth + 1);
      });
      return;
    }
    const std::string near = nearest_key(name, known_names());
    report(place_of_key(), fmt::format("unknown key \"{}\"{}", name,
                                       near.empty() ? "; `isobath check --keys` lists all keys"
                                                    : fmt::format("; did you mean \"{}\"?", near)));
  }

  /// Problems are told at the key, where a user looks, not at its value, which may start lines below.
  [[nodiscard]] std::string place_of_key() const {
    return setting_.empty() ? fmt::format("{}:{}", source_, key_line_) : setting_;
  }
  [[nodiscard]] std::string place_of(const YAML::Node& node) const {
    return setting_.empty() ? fmt::format("{}:{}", source_, node.Mark().line + 1) : setting_;
  }
  [[nodiscard]] std::string place(const std::string& key) const {
    const auto found = places_.find(key);
    return found == places_.end() ? source_ : found->second;
  }
  void report(const std::string& where, const std::string& what) { problems_.push_back(where + ": " + what); }

  std::string source_, setting_;  ///< setting_: "--set key" while one is read
  int key_line_ = 0;
  bool is_read_ = true;  ///< the file, so that a key it lacks is missing
  RunConfig config_;
  std::map<std::string, std::string> places_;
  std::vector<std::string> problems_;
};

}  // namespace

bool matches(const std::string& pattern, const std::string& module) {
  if (!pattern.starts_with("re:")) return pattern == module;
  return std::regex_search(module, std::regex(pattern.substr(3), std::regex::ECMAScript),
                           std::regex_constants::match_continuous);
}

RunConfig parse(const std::string& yaml, const std::vector<std::string>& overrides,
                const std::string& source) {
  Parser parser(source);
  parser.document(yaml);
  for (const std::string& setting : overrides) parser.setting(setting);
  parser.check_across_keys();
  return parser.finish();
}

std::vector<std::pair<std::string, std::string>> RunConfig::flatten() const {
  std::vector<std::pair<std::string, std::string>> values;
  for (const Key& key : key_table()) values.emplace_back(key.info.key, key.text(*this));
  return values;
}

ModuleChoice choice_for(const Quantization& quantization, const std::string& module) {
  ModuleChoice choice{true, quantization.bits, quantization.group};
  for (const std::string& pattern : quantization.ignore)
    if (matches(pattern, module)) choice.quantized = false;
  if (const auto found = quantization.allocated.bits.find(module); found != quantization.allocated.bits.end())
    choice.bits = found->second;
  for (const Override& entry : quantization.overrides) {
    if (!matches(entry.match, module)) continue;
    if (entry.bits != 0) choice.bits = entry.bits;
    if (entry.group >= 0) choice.group = entry.group;
  }
  return choice;
}

}  // namespace isobath::config
