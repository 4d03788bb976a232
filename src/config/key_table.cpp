#include "key_table.hpp"

#include <charconv>

namespace isobath::config {
namespace {

using nlohmann::ordered_json;

/// Largest count taken, so that products of a few of them stay far from overflow.
constexpr int64_t kMaxCount = 1'000'000'000;

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

ordered_json pattern_schema() {
  return {{"type", "string"}, {"minLength", 1}};
}
ordered_json bits_schema() {
  return {{"enum", {2, 3, 4, 5, 6, 8}}};
}
ordered_json group_schema() {
  return {{"anyOf", {{{"enum", {"channel", 0}}}, {{"type", "integer"}, {"minimum", 16}, {"maximum", 4096}}}}};
}

std::string group_text(int64_t group) {
  return group == 0 ? "channel" : std::to_string(group);
}

std::string overrides_text(const std::vector<Override>& overrides) {
  ordered_json list = ordered_json::array();
  for (const Override& entry : overrides) {
    ordered_json item = {{"match", entry.match}};
    if (entry.bits != 0) item["bits"] = entry.bits;
    if (entry.group == 0) item["group"] = "channel";
    if (entry.group > 0) item["group"] = entry.group;
    list.push_back(std::move(item));
  }
  return list.dump();
}

void add_run_keys(Table& t) {
  t.text(
      "model", [](auto& c) -> auto& { return c.model; }, true, "Hugging Face model directory to quantize.");
  t.text(
      "output", [](auto& c) -> auto& { return c.output; }, true,
      "Run directory; it is created, and must be new unless --resume is given.");
  t.word(
      "compute_dtype", [](auto& c) -> auto& { return c.compute_dtype; }, {"auto", "bfloat16", "float32"},
      "Precision of activations and weights in compute; auto takes the checkpoint's where the device is fast "
      "in it.");
  t.word(
      "residency", [](auto& c) -> auto& { return c.residency; }, {"resident"},
      "Where weights stay during a run; resident keeps a stage's blocks in memory.",
      " (the only residency of this version)");
  t.word(
      "format", [](auto& c) -> auto& { return c.format; }, {"compressed-tensors"},
      "Format of the quantized checkpoint.", " (the only format of this version)");
  t.integer_or_auto(
      "ranks.stages", [](auto& c) -> auto& { return c.ranks.stages; }, 1'000'000, "ranks",
      "Pipeline stages that the blocks are split over; stages x replicas is the number of ranks.");
  t.integer_or_auto(
      "ranks.replicas", [](auto& c) -> auto& { return c.ranks.replicas; }, 1'000'000, "ranks",
      "Copies of the pipeline that work on different sequences.");
  t.integer_or_auto(
      "ranks.threads", [](auto& c) -> auto& { return c.ranks.threads; }, 4096, "threads per rank",
      "Threads of a rank; auto shares the cores of a node among its ranks. Part of the fingerprint.");
  t.word(
      "ranks.device", [](auto& c) -> auto& { return c.ranks.device; }, {"auto", "cpu", "cuda"},
      "Where a rank computes; auto takes CUDA where the build and the machine have it.");
  t.real(
      "ranks.activation_gib", [](auto& c) -> auto& { return c.ranks.activation_gib; }, 0, true, 1e6,
      "Memory of a rank for activations that the backward pass of measure reads again; blocks beyond it are "
      "recomputed from their input, with the same result.",
      "GiB");
  t.integer(
      "ranks.watchdog_s", [](auto& c) -> auto& { return c.ranks.watchdog_s; }, 0, "s",
      "Longest wait of a rank for others before it ends the job; 0 waits for ever.");
  t.text(
      "calibration.tokens", [](auto& c) -> auto& { return c.calibration.tokens; }, true,
      "Token file (safetensors) of the calibration set.");
  t.integer(
      "calibration.sequences", [](auto& c) -> auto& { return c.calibration.sequences; }, 1, "sequences",
      "Calibration sequences used.");
  t.integer(
      "calibration.length", [](auto& c) -> auto& { return c.calibration.length; }, 2, "tokens",
      "Length of a calibration sequence.");
  t.integer(
      "calibration.microbatch", [](auto& c) -> auto& { return c.calibration.microbatch; }, 1, "sequences",
      "Sequences that travel together; it fixes the shapes of the sums and thereby the result's bits.");
  t.integer(
      "calibration.logical_shards", [](auto& c) -> auto& { return c.calibration.logical_shards; }, 1,
      "shards",
      "Fixed shards that sequences are dealt into, so that any number of ranks gives the same bits; at least "
      "the "
      "number of replicas.");
  t.integer(
      "calibration.seed", [](auto& c) -> auto& { return c.calibration.seed; }, 0, "",
      "Key of every random number: choice of sequences, drawn labels, probe signs.");
}

void add_sensitivity_keys(Table& t) {
  t.word(
      "sensitivity.loss", [](auto& c) -> auto& { return c.sensitivity.loss; }, {"nll", "fisher"},
      "Loss whose gradients weigh the tokens: nll takes the data's labels, fisher labels drawn from the "
      "model.");
  t.integer(
      "sensitivity.samples", [](auto& c) -> auto& { return c.sensitivity.samples; }, 1, "draws per token",
      "Label draws per token; above 1 only with loss fisher.");
  t.word(
      "sensitivity.per_sequence", [](auto& c) -> auto& { return c.sensitivity.per_sequence; },
      {"off", "probes", "exact"},
      "How the per-sequence sensitivity (equation 5) is had: not, from random probes, or exactly.");
  t.integer(
      "sensitivity.probes", [](auto& c) -> auto& { return c.sensitivity.probes; }, 1, "probes per sequence",
      "Random +-1 probes of the per-sequence estimator.");
  t.integer(
      "sensitivity.row_groups", [](auto& c) -> auto& { return c.sensitivity.row_groups; }, 1, "groups",
      "Groups of output rows with a token weight and a covariance of their own.");
  t.real(
      "sensitivity.clip_quantile", [](auto& c) -> auto& { return c.sensitivity.clip_quantile; }, 0, false, 1,
      "Token weights above this quantile are lowered to it; 1 lowers none.");
  t.real(
      "sensitivity.exponent", [](auto& c) -> auto& { return c.sensitivity.exponent; }, 0, true, 4,
      "Power that token weights are raised to; 0 makes all tokens equal.");
  t.real(
      "sensitivity.shrinkage", [](auto& c) -> auto& { return c.sensitivity.shrinkage; }, 0, true, 1,
      "Share of the covariance of equal tokens mixed into the weighted one; auto takes d / (d + effective "
      "tokens).",
      "", /*with_auto=*/true);
  t.flag(
      "sensitivity.covariance", [](auto& c) -> auto& { return c.sensitivity.covariance; },
      "Also stores the weighted covariance of every module of the unquantized model.");
  t.add(
      "sensitivity.gram.bits", "list of widths", "bits",
      "Widths whose effect on the loss is scored in every module while measuring, for `isobath allocate`; "
      "empty "
      "scores none. Costs one product of a weight gradient's size a linear and sequence.",
      {{"type", "array"}, {"items", bits_schema()}, {"uniqueItems", true}},
      [](RunConfig& c, const YAML::Node& node) { c.sensitivity.gram_bits = read_widths(node); },
      [](const RunConfig& c) { return ordered_json(c.sensitivity.gram_bits).dump(); });
  t.text(
      "sensitivity.reuse", [](auto& c) -> auto& { return c.sensitivity.reuse; }, false,
      "Finished measure/ directory of another run to use instead of measuring; empty measures.");
}

void add_quantization_keys(Table& t) {
  t.word(
      "quantization.solver", [](auto& c) -> auto& { return c.quantization.solver; },
      {"gptq", "round_to_nearest"}, "How codes are chosen.");
  t.word(
      "quantization.weighting", [](auto& c) -> auto& { return c.quantization.weighting; },
      {"sensitivity", "none"},
      "Weight of tokens in the covariance; none makes all equal, which is plain GPTQ.");
  t.add(
      "quantization.bits", "one of: 2 | 3 | 4 | 5 | 6 | 8", "bits", "Width of a code.", bits_schema(),
      [](RunConfig& c, const YAML::Node& node) { c.quantization.bits = read_bits(node); },
      [](const RunConfig& c) { return std::to_string(c.quantization.bits); });
  t.add(
      "quantization.group", "channel or integer from 16 to 4096", "input channels",
      "Input channels that share a scale; channel (or 0) gives one scale to an output row.", group_schema(),
      [](RunConfig& c, const YAML::Node& node) { c.quantization.group = read_group(node); },
      [](const RunConfig& c) { return group_text(c.quantization.group); });
  t.flag(
      "quantization.symmetric", [](auto& c) -> auto& { return c.quantization.symmetric; },
      "Grids without a zero point.");
  t.flag(
      "quantization.clip_search", [](auto& c) -> auto& { return c.quantization.clip_search; },
      "Searches the clipping range that minimises the weighted error; false takes min and max.");
  t.word(
      "quantization.act_order", [](auto& c) -> auto& { return c.quantization.act_order; }, {"none", "static"},
      "Order of columns in the solver: as they stand, or by falling diagonal with groups fixed first.");
  t.real(
      "quantization.damping", [](auto& c) -> auto& { return c.quantization.damping; }, 0, false, 1,
      "Share of the mean diagonal added to the covariance's diagonal.");
  t.integer(
      "quantization.refinement.sweeps", [](auto& c) -> auto& { return c.quantization.refinement.sweeps; }, 0,
      "sweeps",
      "Coordinate-descent sweeps over codes and scales after the column loop, at most; 0 does none.");
  t.word(
      "quantization.asymmetric.correction",
      [](auto& c) -> auto& { return c.quantization.asymmetric.correction; }, {"none", "qep", "gptaq"},
      "Correction of the weights for what the quantized prefix did to their input; none ignores it. Costs "
      "one "
      "more forward pass.");
  t.real(
      "quantization.asymmetric.strength", [](auto& c) -> auto& { return c.quantization.asymmetric.strength; },
      0, true, 1, "Share of the correction that is made.");
  t.real(
      "quantization.asymmetric.ridge", [](auto& c) -> auto& { return c.quantization.asymmetric.ridge; }, 0,
      false, 1000, "Share of the mean diagonal added to the covariance in correction qep.");
  t.word(
      "quantization.reestimate.policy", [](auto& c) -> auto& { return c.quantization.reestimate.policy; },
      {"never", "every"}, "When token weights are measured again behind the blocks quantized so far.");
  t.integer(
      "quantization.reestimate.blocks", [](auto& c) -> auto& { return c.quantization.reestimate.blocks; }, 1,
      "blocks", "Blocks between two measurements with policy every.");
  t.add(
      "quantization.ignore", "list of text", "",
      "Modules left as they are: names, or re: and a regular expression matched from the start of the name.",
      {{"type", "array"}, {"items", pattern_schema()}},
      [](RunConfig& c, const YAML::Node& node) { c.quantization.ignore = read_patterns(node); },
      [](const RunConfig& c) { return ordered_json(c.quantization.ignore).dump(); });
  t.add(
      "quantization.overrides", "list of {match, bits, group}", "",
      "Bits and group of the modules whose name matches (as in ignore); a later entry wins over an earlier "
      "one.",
      {{"type", "array"},
       {"items",
        {{"type", "object"},
         {"additionalProperties", false},
         {"properties", {{"match", pattern_schema()}, {"bits", bits_schema()}, {"group", group_schema()}}},
         {"required", {"match"}},
         {"minProperties", 2}}}},
      [](RunConfig& c, const YAML::Node& node) { c.quantization.overrides = read_overrides(node); },
      [](const RunConfig& c) { return overrides_text(c.quantization.overrides); });
  t.text(
      "quantization.allocation", [](auto& c) -> auto& { return c.quantization.allocation; }, false,
      "File of widths that `isobath allocate` wrote; entries of overrides win over it. Empty: none.");
}

void add_closing_keys(Table& t) {
  t.text(
      "evaluation.tokens", [](auto& c) -> auto& { return c.evaluation.tokens; }, false,
      "Token file (safetensors) to evaluate on; empty skips the evaluation.");
  t.integer(
      "evaluation.window", [](auto& c) -> auto& { return c.evaluation.window; }, 2, "tokens",
      "Length of an evaluation window; windows do not overlap.");
  t.integer(
      "evaluation.windows", [](auto& c) -> auto& { return c.evaluation.windows; }, 1, "windows",
      "Windows evaluated, from the start of the file.");
  t.integer(
      "checkpoint.every_blocks", [](auto& c) -> auto& { return c.checkpoint.every_blocks; }, 1, "blocks",
      "Quantized blocks between two saved states.");
  t.integer(
      "checkpoint.keep", [](auto& c) -> auto& { return c.checkpoint.keep; }, 1, "generations",
      "Saved states kept; with 2 a damaged newest one costs one interval.");
  t.text(
      "plan.cluster", [](auto& c) -> auto& { return c.plan.cluster; }, false,
      "Cluster description (YAML, isobath plan --calibrate writes one) whose predicted times and memory a "
      "run "
      "records beside the measured ones; empty records none.");
}

}  // namespace

const std::vector<Key>& key_table() {
  static const std::vector<Key> kTable = [] {
    Table table;
    add_run_keys(table);
    add_sensitivity_keys(table);
    add_quantization_keys(table);
    add_closing_keys(table);
    return std::move(table.keys_);
  }();
  return kTable;
}

}  // namespace isobath::config
