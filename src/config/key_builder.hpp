#pragma once
#include <charconv>

#include "key_table.hpp"

/// Builds the key table: one call a key, by the type of its value.
namespace isobath::config {

using nlohmann::ordered_json;

/// Largest count taken, so that products of a few of them stay far from overflow.
inline constexpr int64_t kMaxCount = 1'000'000'000;

template <class T>
T number_of(const YAML::Node& node, const std::string& expected) {
  T value{};
  if (node.IsScalar() && node.Tag() != "!") {
    const std::string& text = node.Scalar();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size()) return value;
  }
  throw Mismatch(fmt::format("expected {}, found {}", expected, found_text(node)));
}

/// Field accessors are generic lambdas `(auto& c) -> auto&`, one for reading and writing.
template <class Field>
using ValueOf = std::remove_cvref_t<std::invoke_result_t<Field, RunConfig&>>;

class Table {
 public:
  template <class Field>
  void text(const std::string& key, Field field, bool is_required, const std::string& description) {
    add(
        key, "text", "", description, {{"type", "string"}},
        [field, is_required](RunConfig& c, const YAML::Node& node) {
          field(c) = !is_required && (node.IsNull() || (node.IsScalar() && node.Scalar().empty()))
                         ? std::string()
                         : read_text(node);
        },
        [field](const RunConfig& c) { return quoted_if_needed(field(c)); }, is_required);
  }

  template <class Field>
  void word(const std::string& key, Field field, const std::vector<std::string>& words,
            const std::string& description, const std::string& note = "") {
    const std::string listed = joined(words, " | ");
    add(
        key, words.size() == 1 ? "only: " + listed : "one of: " + listed, "", description, {{"enum", words}},
        [=](RunConfig& c, const YAML::Node& node) {
          const std::string text = node.IsScalar() ? node.Scalar() : "";
          if (std::find(words.begin(), words.end(), text) == words.end())
            throw Mismatch(fmt::format("expected {}{}{}, found {}", words.size() == 1 ? "" : "one of ",
                                       listed, note, found_text(node)));
          field(c) = text;
        },
        [field](const RunConfig& c) { return field(c); });
  }

  template <class Field>
  void flag(const std::string& key, Field field, const std::string& description) {
    add(
        key, "true or false", "", description, {{"type", "boolean"}},
        [field](RunConfig& c, const YAML::Node& node) {
          const bool is_true = node.IsScalar() && node.Tag() != "!" && node.Scalar() == "true";
          if (!is_true && !(node.IsScalar() && node.Tag() != "!" && node.Scalar() == "false"))
            throw Mismatch(fmt::format("expected true or false, found {}", found_text(node)));
          field(c) = is_true;
        },
        [field](const RunConfig& c) { return std::string(field(c) ? "true" : "false"); });
  }

  /// An integer from `least` to kMaxCount; seeds go to the end of their type.
  template <class Field>
  void integer(const std::string& key, Field field, int64_t least, const std::string& unit,
               const std::string& description) {
    using T = ValueOf<Field>;
    const std::string type = fmt::format("integer, at least {}", least);
    add(
        key, type, unit, description, {{"type", "integer"}, {"minimum", least}},
        [field, type, least](RunConfig& c, const YAML::Node& node) {
          const T value = number_of<T>(node, type);
          if constexpr (std::is_signed_v<T>) {
            if (value < least) throw Mismatch(fmt::format("expected {}, found {}", type, value));
            if (value > kMaxCount)
              throw Mismatch(fmt::format("expected at most {}, found {}", kMaxCount, value));
          }
          field(c) = value;
        },
        [field](const RunConfig& c) { return std::to_string(field(c)); });
  }

  /// An integer of at least 1, or `auto` (0 in the struct).
  template <class Field>
  void integer_or_auto(const std::string& key, Field field, int64_t most, const std::string& unit,
                       const std::string& description) {
    using T = ValueOf<Field>;
    const std::string type = fmt::format("auto or integer from 1 to {}", most);
    add(
        key, type, unit, description,
        {{"anyOf", {{{"const", "auto"}}, {{"type", "integer"}, {"minimum", 1}, {"maximum", most}}}}},
        [=](RunConfig& c, const YAML::Node& node) {
          const bool is_auto = node.IsScalar() && node.Scalar() == "auto";
          const T value = is_auto ? T{0} : number_of<T>(node, type);
          if (!is_auto && (value < 1 || value > most))
            throw Mismatch(fmt::format("expected {}, found {}", type, value));
          field(c) = value;
        },
        [field](const RunConfig& c) { return field(c) == 0 ? "auto" : std::to_string(field(c)); });
  }

  /// A real number in (least, most], or [least, most] when `with_least`; `with_auto` also takes the word (−1
  /// in the struct).
  template <class Field>
  void real(const std::string& key, Field field, double least, bool with_least, double most,
            const std::string& description, const std::string& unit = "", bool with_auto = false) {
    const std::string type = fmt::format("{}number {} {} and at most {}", with_auto ? "auto or " : "",
                                         with_least ? "at least" : "above", least, most);
    ordered_json schema = {
        {"type", "number"}, {with_least ? "minimum" : "exclusiveMinimum", least}, {"maximum", most}};
    if (with_auto) schema = {{"anyOf", {{{"const", "auto"}}, schema}}};
    add(
        key, type, unit, description, schema,
        [=](RunConfig& c, const YAML::Node& node) {
          if (with_auto && node.IsScalar() && node.Scalar() == "auto") {
            field(c) = -1;
            return;
          }
          const double value = number_of<double>(node, type);
          // Written so that NaN fails.
          if (!((with_least ? value >= least : value > least) && value <= most))
            throw Mismatch(fmt::format("expected {}, found {}", type, value));
          field(c) = value;
        },
        [=](const RunConfig& c) { return with_auto && field(c) < 0 ? "auto" : fmt::format("{}", field(c)); });
  }

  void add(const std::string& key, const std::string& type, const std::string& unit,
           const std::string& description, ordered_json schema,
           std::function<void(RunConfig&, const YAML::Node&)> assign,
           std::function<std::string(const RunConfig&)> text, bool is_required = false) {
    static const RunConfig kDefaults;
    const std::string default_text = is_required ? "" : text(kDefaults);
    if (!is_required) schema["default"] = default_value(schema, default_text);
    keys_.push_back({{key, type, default_text, unit, description, is_required},
                     std::move(schema),
                     std::move(assign),
                     std::move(text)});
  }

  std::vector<Key> keys_;

 private:
  static ordered_json default_value(const ordered_json& schema, const std::string& text) {
    const bool is_text = (schema.contains("type") && schema["type"] == "string") ||
                         (schema.contains("enum") && schema["enum"][0].is_string());
    if (is_text || !ordered_json::accept(text)) return text;
    return ordered_json::parse(text);
  }
};

}  // namespace isobath::config
