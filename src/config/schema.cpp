#include <isobath/config/schema.hpp>

#include <algorithm>

#include "key_table.hpp"

namespace isobath::config {
namespace {

using nlohmann::ordered_json;

/// Edits (insert, delete, replace, swap of neighbours) that turn one text into the other.
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> cost(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        cost[i][j] = i + j;
        continue;
      }
      cost[i][j] = std::min(
          {cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
    }
  }
  return cost[a.size()][b.size()];
}

std::string last_part(const std::string& key) {
  return key.substr(key.rfind('.') + 1);
}

/// The object of a dotted key's section, made on the way.
ordered_json& section_of(ordered_json& root, const std::string& key) {
  ordered_json* section = &root;
  size_t begin = 0;
  for (size_t dot = key.find('.'); dot != std::string::npos; begin = dot + 1, dot = key.find('.', begin)) {
    ordered_json& child = (*section)["properties"][key.substr(begin, dot - begin)];
    if (child.is_null()) child = {{"type", "object"}, {"additionalProperties", false}};
    section = &child;
  }
  return *section;
}

}  // namespace

const std::vector<KeyInfo>& all_keys() {
  static const std::vector<KeyInfo> kKeys = [] {
    std::vector<KeyInfo> keys;
    for (const Key& key : key_table()) keys.push_back(key.info);
    return keys;
  }();
  return kKeys;
}

std::string nearest_key(const std::string& unknown, const std::vector<std::string>& known) {
  constexpr size_t kLongestKey = 200;
  if (unknown.empty() || unknown.size() > kLongestKey) return {};
  std::string best;
  size_t best_distance = std::max<size_t>(1, unknown.size() / 3) + 1;
  for (const std::string& key : known) {
    const size_t distance = edit_distance(unknown, key);
    if (distance < best_distance) {
      best = key;
      best_distance = distance;
    }
  }
  // A key in the wrong section is far by edits and still plainly meant.
  const auto same_name = [&](const std::string& key) { return last_part(key) == last_part(unknown); };
  if (best_distance > 2 && std::count_if(known.begin(), known.end(), same_name) == 1)
    return *std::find_if(known.begin(), known.end(), same_name);
  return best;
}

std::string json_schema() {
  ordered_json root = {{"$schema", "https://json-schema.org/draft/2020-12/schema"},
                       {"title", "isobath run configuration"},
                       {"type", "object"},
                       {"additionalProperties", false}};
  for (const Key& key : key_table()) {
    ordered_json value = key.schema;
    value["description"] =
        key.info.description + (key.info.unit.empty() ? "" : fmt::format(" Unit: {}.", key.info.unit));
    ordered_json& section = section_of(root, key.info.key);
    section["properties"][last_part(key.info.key)] = std::move(value);
    if (key.info.is_required) section["required"].push_back(last_part(key.info.key));
  }
  root["required"].push_back("calibration");
  return root.dump(2) + "\n";
}

std::string keys_markdown() {
  std::string page, section = "-";
  const auto escaped = [](const std::string& text) {
    std::string result;
    for (const char c : text) result += c == '|' ? std::string("\\|") : std::string(1, c);
    return result;
  };
  for (const KeyInfo& key : all_keys()) {
    const size_t dot = key.key.find('.');
    const std::string of_key = dot == std::string::npos ? "" : key.key.substr(0, dot);
    if (of_key != section) {
      section = of_key;
      page += fmt::format(
          "{}## {}\n\n| key | value | default | unit | meaning |\n| --- | --- | --- | --- | --- |\n",
          page.empty() ? "" : "\n", section.empty() ? "The run" : section);
    }
    const std::string shown_default = key.is_required            ? "**required**"
                                      : key.default_text.empty() ? "empty"
                                                                 : fmt::format("`{}`", key.default_text);
    page += fmt::format("| `{}` | {} | {} | {} | {} |\n", key.key, escaped(key.type), shown_default, key.unit,
                        escaped(key.description));
  }
  return page;
}

}  // namespace isobath::config
