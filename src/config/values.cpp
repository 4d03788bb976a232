#include <charconv>
#include <regex>
#include <set>

#include "key_table.hpp"

namespace isobath::config {
namespace {

const std::vector<int> kBits{2, 3, 4, 5, 6, 8};
constexpr int64_t kMinGroup = 16, kMaxGroup = 4096;

template <class... Arguments>
[[noreturn]] void mismatch(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  throw Mismatch(fmt::format(format, std::forward<Arguments>(arguments)...));
}

std::string read_pattern(const YAML::Node& node) {
  const std::string pattern = read_text(node);
  if (!pattern.starts_with("re:")) return pattern;
  try {
    const std::regex compiled(pattern.substr(3), std::regex::ECMAScript);
  } catch (const std::regex_error& error) {
    mismatch("expected a regular expression after \"re:\", found \"{}\" ({})", pattern, error.what());
  }
  return pattern;
}

Override read_override(const YAML::Node& node, size_t position) {
  if (!node.IsMap())
    mismatch("expected entry {} to be a map such as {{match: 're:.*down_proj', bits: 4}}, found {}", position,
             found_text(node));
  Override result;
  std::set<std::string> seen;
  for (const auto& field : node) {
    const std::string name = field.first.IsScalar() ? field.first.Scalar() : found_text(field.first);
    if (!seen.insert(name).second) mismatch("entry {} names \"{}\" twice", position, name);
    try {
      if (name == "match") {
        result.match = read_pattern(field.second);
      } else if (name == "bits") {
        result.bits = read_bits(field.second);
      } else if (name == "group") {
        result.group = read_group(field.second);
      } else {
        const std::string near = nearest_key(name, {"match", "bits", "group"});
        mismatch("expected match, bits or group, found \"{}\"{}", name,
                 near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near));
      }
    } catch (const Mismatch& problem) {
      mismatch("entry {}: {}: {}", position, name, problem.what());
    }
  }
  if (result.match.empty())
    mismatch("entry {} has no \"match\": a module name, or re: and a pattern", position);
  if (result.bits == 0 && result.group < 0)
    mismatch("entry {} changes nothing: give bits or group", position);
  return result;
}

}  // namespace

std::string joined(const std::vector<std::string>& words, const std::string& separator) {
  return fmt::format("{}", fmt::join(words, separator));
}

std::string found_text(const YAML::Node& node) {
  if (!node.IsDefined() || node.IsNull()) return "nothing";
  if (node.IsSequence()) return "a list";
  if (node.IsMap()) return "a map";
  // yaml-cpp tags a quoted scalar "!": a quoted number is text.
  return node.Tag() == "!" ? fmt::format("the text \"{}\"", node.Scalar())
                           : fmt::format("\"{}\"", node.Scalar());
}

std::string read_text(const YAML::Node& node) {
  if (!node.IsScalar() || node.Scalar().empty()) mismatch("expected text, found {}", found_text(node));
  return node.Scalar();
}

int read_bits(const YAML::Node& node) {
  if (node.IsScalar() && node.Tag() != "!")
    for (const int bits : kBits)
      if (node.Scalar() == std::to_string(bits)) return bits;
  mismatch("expected one of {}, found {}", fmt::join(kBits, " | "), found_text(node));
}

std::vector<int> read_widths(const YAML::Node& node) {
  if (!node.IsSequence()) mismatch("expected a list of widths such as [2, 3, 4], found {}", found_text(node));
  std::vector<int> widths;
  for (const auto& entry : node) {
    const int bits = read_bits(entry);
    if (!widths.empty() && bits <= widths.back())
      mismatch("expected distinct widths in ascending order, found {} after {}", bits, widths.back());
    widths.push_back(bits);
  }
  return widths;
}

static std::vector<std::string> read_texts(const YAML::Node& node, const char* what,
                                           std::string (*read)(const YAML::Node&)) {
  if (!node.IsSequence()) config::mismatch("expected a list of {}, found {}", what, found_text(node));
  std::vector<std::string> texts;
  for (const auto& entry : node) texts.push_back(read(entry));
  return texts;
}

std::vector<std::string> read_paths(const YAML::Node& node) {
  return read_texts(node, "paths such as [runs/three-bits/model]", read_text);
}

int64_t read_group(const YAML::Node& node) {
  if (node.IsScalar() && node.Scalar() == "channel") return 0;
  if (node.IsScalar() && node.Tag() != "!") {
    const std::string& text = node.Scalar();
    if (text == "0") return 0;
    int64_t group = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), group);
    if (error == std::errc() && end == text.data() + text.size() && kMinGroup <= group && group <= kMaxGroup)
      return group;
  }
  mismatch("expected channel or an integer from {} to {}, found {}", kMinGroup, kMaxGroup, found_text(node));
}

std::vector<std::string> read_patterns(const YAML::Node& node) {
  return read_texts(node, "module names such as [lm_head]", read_pattern);
}

std::vector<Override> read_overrides(const YAML::Node& node) {
  if (!node.IsSequence())
    mismatch("expected a list such as [{{match: 're:.*down_proj', bits: 4}}], found {}", found_text(node));
  std::vector<Override> overrides;
  for (const auto& entry : node) overrides.push_back(read_override(entry, overrides.size() + 1));
  return overrides;
}

std::string quoted_if_needed(const std::string& text) {
  if (text.empty()) return text;
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(text);
    if (documents.size() == 1 && documents[0].IsScalar() && documents[0].Tag() != "!" &&
        documents[0].Scalar() == text)
      return text;
  } catch (const YAML::Exception&) {
    // Not YAML as it stands: quote it.
  }
  return nlohmann::json(text).dump();
}

}  // namespace isobath::config
