#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>
#include <isobath/model/model_config.hpp>
#include <nlohmann/json.hpp>

namespace isobath::model {
namespace {

using nlohmann::json;

constexpr int64_t kMaxConfigBytes = int64_t{16} << 20;
// Bounds on an untrusted file: products of two sizes stay far inside 64 bits, and a loop over blocks ends.
constexpr int64_t kMaxSize = int64_t{1} << 31;
constexpr int64_t kMaxBlocks = 10'000;

// What the configuration classes of transformers 5.23 assume for a key that is absent.
constexpr double kDefaultRmsEps = 1e-6;
constexpr double kDefaultRopeTheta = 10000.0;
constexpr int64_t kDefaultWindow = 4096;

/// How an architecture differs from the others. A key that only some know is not looked at for the others.
struct Architecture {
  std::string_view name;
  int64_t default_max_position;
  std::optional<int64_t> default_bos_token = {};
  bool reads_attention_bias = false, reads_mlp_bias = false;
  bool has_qkv_bias = false, has_head_norms = false;  ///< whatever the keys say
  /// Whether these follow from others where they are absent: transformers has one model's value for them.
  bool derives_kv_heads = false, derives_head_dim = true;
  enum class Window { none, unless_null, on_request } window = Window::none;
};
constexpr std::array<Architecture, 4> kArchitectures = {{
    {.name = "LlamaForCausalLM",
     .default_max_position = 2048,
     .default_bos_token = 1,
     .reads_attention_bias = true,
     .reads_mlp_bias = true,
     .derives_kv_heads = true},
    {.name = "MistralForCausalLM",
     .default_max_position = 131072,
     .default_bos_token = 1,
     .window = Architecture::Window::unless_null},
    {.name = "Qwen2ForCausalLM",
     .default_max_position = 32768,
     .has_qkv_bias = true,
     .window = Architecture::Window::on_request},
    {.name = "Qwen3ForCausalLM",
     .default_max_position = 32768,
     .reads_attention_bias = true,
     .has_head_norms = true,
     .derives_head_dim = false,
     .window = Architecture::Window::on_request},
}};

/// One JSON object of config.json that knows its name, so that every complaint says file and key.
class Section {
 public:
  Section(const json& object, std::string file, std::string prefix)
      : object_(object), file_(std::move(file)), prefix_(std::move(prefix)) {}

  [[nodiscard]] bool contains(const char* key) const { return object_.contains(key); }
  /// Present and not null.
  [[nodiscard]] bool has(const char* key) const {
    return object_.contains(key) && !object_.at(key).is_null();
  }

  [[nodiscard]] int64_t size(const char* key, int64_t largest = kMaxSize) const {
    const json& value = at(key);
    if (!value.is_number_integer()) wrong(key, "a positive integer");
    const int64_t number =
        value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(kMaxSize)
            ? kMaxSize + 1
            : value.get<int64_t>();
    if (number < 1 || number > largest) wrong(key, fmt::format("an integer in [1, {}]", largest));
    return number;
  }
  [[nodiscard]] int64_t size_or(const char* key, int64_t otherwise) const {
    return has(key) ? size(key) : otherwise;
  }

  [[nodiscard]] double positive(const char* key) const {
    const json& value = at(key);
    if (!value.is_number()) wrong(key, "a positive number");
    const double number = value.get<double>();
    if (!std::isfinite(number) || number <= 0) wrong(key, "a positive finite number");
    return number;
  }
  [[nodiscard]] double positive_or(const char* key, double otherwise) const {
    return has(key) ? positive(key) : otherwise;
  }

  [[nodiscard]] bool flag_or(const char* key, bool otherwise) const {
    if (!has(key)) return otherwise;
    if (!at(key).is_boolean()) wrong(key, "true or false");
    return at(key).get<bool>();
  }

  [[nodiscard]] std::string text(const char* key) const {
    if (!at(key).is_string()) wrong(key, "a string");
    return at(key).get<std::string>();
  }

  [[nodiscard]] Section section(const char* key) const {
    if (!at(key).is_object()) wrong(key, "an object");
    return {at(key), file_, prefix_ + key + "."};
  }

  [[nodiscard]] const json& at(const char* key) const {
    if (!has(key)) fail<DataError>("{}: key '{}{}' is missing", file_, prefix_, key);
    return object_.at(key);
  }

  [[noreturn]] void wrong(const char* key, const std::string& expected) const {
    std::string found = object_.at(key).dump(-1, ' ', true, json::error_handler_t::replace);
    if (found.size() > 80) found = found.substr(0, 80) + "…";
    fail<DataError>("{}: key '{}{}': expected {}, found {}", file_, prefix_, key, expected, found);
  }

 private:
  const json& object_;
  std::string file_, prefix_;
};

const Architecture& read_architecture(const Section& config) {
  const json& value = config.at("architectures");
  if (!value.is_array() || value.size() != 1 || !value[0].is_string()) {
    config.wrong("architectures", "a list with one name");
  }
  const auto name = value[0].get<std::string>();
  const auto found = std::ranges::find(kArchitectures, name, &Architecture::name);
  if (found == kArchitectures.end()) {
    std::vector<std::string_view> names;
    for (const Architecture& known : kArchitectures) names.push_back(known.name);
    config.wrong("architectures", fmt::format("a supported model ({})", fmt::join(names, ", ")));
  }
  return *found;
}

std::optional<int64_t> read_sliding_window(const Section& config, Architecture::Window kind) {
  if (kind == Architecture::Window::none) return {};
  if (kind == Architecture::Window::on_request && !config.flag_or("use_sliding_window", false)) return {};
  if (config.contains("sliding_window") && !config.has("sliding_window")) return {};
  return config.size_or("sliding_window", kDefaultWindow);
}

/// null: as many as heads, in every architecture.
int64_t read_kv_heads(const Section& config, const Architecture& architecture, int64_t n_heads) {
  const bool is_needed = !architecture.derives_kv_heads && !config.contains("num_key_value_heads");
  return is_needed ? config.size("num_key_value_heads") : config.size_or("num_key_value_heads", n_heads);
}

at::ScalarType read_dtype(const Section& config) {
  const char* key = config.has("dtype") ? "dtype" : "torch_dtype";
  // transformers loads a checkpoint that does not say its type in f32.
  if (!config.has(key)) return at::ScalarType::Float;
  const std::string name = config.text(key);
  if (name == "bfloat16") return at::ScalarType::BFloat16;
  if (name == "float16") return at::ScalarType::Half;
  if (name == "float32") return at::ScalarType::Float;
  config.wrong(key, "bfloat16, float16 or float32");
}

/// Both spellings: `rope_theta` beside `rope_scaling {type | rope_type, …}`, and `rope_parameters` of
/// transformers 5. Precedence as in its PreTrainedConfig.convert_rope_params_to_dict.
RopeConfig read_rope(const Section& config, int64_t max_position) {
  RopeConfig rope;
  rope.theta = config.positive_or("rope_theta", kDefaultRopeTheta);
  const char* key =
      config.has("rope_scaling") && !config.at("rope_scaling").empty() ? "rope_scaling" : "rope_parameters";
  const bool is_partial =
      config.has("partial_rotary_factor") && config.positive("partial_rotary_factor") != 1.0;
  if (is_partial) config.wrong("partial_rotary_factor", "1 (rotary embedding of whole heads)");
  if (!config.has(key)) return rope;

  const Section parameters = config.section(key);
  rope.theta = parameters.positive_or("rope_theta", rope.theta);
  if (parameters.positive_or("partial_rotary_factor", 1.0) != 1.0) {
    parameters.wrong("partial_rotary_factor", "1 (rotary embedding of whole heads)");
  }
  const char* type_key = parameters.has("rope_type") ? "rope_type" : "type";
  const std::string type = parameters.has(type_key) ? parameters.text(type_key) : "default";
  if (type == "default") return rope;
  if (type == "linear") {
    rope.type = RopeConfig::Type::linear;
    rope.factor = parameters.positive("factor");
    return rope;
  }
  if (type != "llama3") parameters.wrong(type_key, "one of default, linear, llama3");
  rope.type = RopeConfig::Type::llama3;
  rope.factor = parameters.positive("factor");
  rope.low_frequency_factor = parameters.positive("low_freq_factor");
  rope.high_frequency_factor = parameters.positive("high_freq_factor");
  if (rope.high_frequency_factor <= rope.low_frequency_factor) {
    parameters.wrong("high_freq_factor",
                     fmt::format("more than low_freq_factor = {}", rope.low_frequency_factor));
  }
  rope.original_max_position =
      config.size_or("original_max_position_embeddings",
                     parameters.size_or("original_max_position_embeddings", max_position));
  return rope;
}

void check_heads(const ModelConfig& config, const std::string& file) {
  if (config.n_heads % config.n_kv_heads != 0) {
    fail<DataError>("{}: num_attention_heads = {} is not a multiple of num_key_value_heads = {}", file,
                    config.n_heads, config.n_kv_heads);
  }
  if (config.head_dim % 2 != 0) {
    fail<DataError>("{}: head_dim = {} is odd; the rotary embedding needs pairs of channels", file,
                    config.head_dim);
  }
}

json parse_object(const std::string& text, const std::string& file) {
  json object;
  try {
    object = json::parse(text);
  } catch (const json::exception& error) {
    fail<DataError>("{}: not valid JSON: {}", file, error.what());
  }
  if (!object.is_object()) fail<DataError>("{}: expected a JSON object, found {}", file, object.type_name());
  return object;
}

}  // namespace

std::string_view name_of(Projection projection) {
  constexpr std::array<std::string_view, kProjections> kNames = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                                 "gate_proj", "up_proj", "down_proj"};
  return kNames[static_cast<size_t>(projection)];
}

std::span<const Projection> input_set(int set) {
  static constexpr std::array<Projection, kProjections> kOrder = {
      Projection::q,    Projection::k,  Projection::v,   Projection::o,
      Projection::gate, Projection::up, Projection::down};
  static constexpr std::array<size_t, kInputSets + 1> kBegin = {0, 3, 4, 6, 7};
  ISOBATH_CHECK(0 <= set && set < kInputSets, "input set {} of {}", set, kInputSets);
  const auto index = static_cast<size_t>(set);
  return std::span(kOrder).subspan(kBegin[index], kBegin[index + 1] - kBegin[index]);
}

std::string_view name_of_input_set(int set) {
  static constexpr std::array<std::string_view, kInputSets> kNames = {"q/k/v", "o", "gate/up", "down"};
  ISOBATH_CHECK(0 <= set && set < kInputSets, "input set {} of {}", set, kInputSets);
  return kNames[static_cast<size_t>(set)];
}

ModelConfig read_model_config(const std::filesystem::path& directory) {
  const auto path = directory / "config.json";
  if (!std::filesystem::is_regular_file(path)) {
    fail<DataError>("{} not found; expected a Hugging Face model directory with a config.json",
                    path.string());
  }
  const std::string file = path.string();
  const json object = parse_object(io::read_text(path, kMaxConfigBytes), file);
  const Section section(object, file, "");

  ModelConfig config;
  const Architecture& architecture = read_architecture(section);
  config.architecture = architecture.name;
  config.vocab_size = section.size("vocab_size");
  config.d_model = section.size("hidden_size");
  config.d_ff = section.size("intermediate_size");
  config.n_blocks = section.size("num_hidden_layers", kMaxBlocks);
  config.n_heads = section.size("num_attention_heads");
  config.n_kv_heads = read_kv_heads(section, architecture, config.n_heads);
  if (section.has("head_dim") || !architecture.derives_head_dim) {
    config.head_dim = section.size("head_dim");
  } else if (config.d_model % config.n_heads == 0) {
    config.head_dim = config.d_model / config.n_heads;
  } else {
    fail<DataError>(
        "{}: hidden_size = {} is not a multiple of num_attention_heads = {}, and head_dim is not given", file,
        config.d_model, config.n_heads);
  }
  check_heads(config, file);
  config.max_position = section.size_or("max_position_embeddings", architecture.default_max_position);
  config.rms_eps = section.positive_or("rms_norm_eps", kDefaultRmsEps);
  config.tied_embeddings = section.flag_or("tie_word_embeddings", false);
  config.o_bias = architecture.reads_attention_bias && section.flag_or("attention_bias", false);
  config.qkv_bias = config.o_bias || architecture.has_qkv_bias;
  config.mlp_bias = architecture.reads_mlp_bias && section.flag_or("mlp_bias", false);
  config.head_norms = architecture.has_head_norms;
  config.sliding_window = read_sliding_window(section, architecture.window);
  if (section.has("hidden_act") && section.text("hidden_act") != "silu") section.wrong("hidden_act", "silu");
  config.rope = read_rope(section, config.max_position);
  config.dtype = read_dtype(section);
  if (!object.contains("bos_token_id")) {
    config.bos_token = architecture.default_bos_token;
  } else if (section.has("bos_token_id")) {
    if (!section.at("bos_token_id").is_number_unsigned() ||
        section.at("bos_token_id").get<uint64_t>() >= static_cast<uint64_t>(config.vocab_size)) {
      section.wrong("bos_token_id", fmt::format("a token in [0, {})", config.vocab_size));
    }
    config.bos_token = section.at("bos_token_id").get<int64_t>();
  }
  return config;
}

int64_t rows_of_head(const ModelConfig& config, Projection projection) {
  const bool has_heads =
      projection == Projection::q || projection == Projection::k || projection == Projection::v;
  return has_heads ? config.head_dim : 1;
}

ModuleShape module_shape(const ModelConfig& config, Projection projection) {
  const int64_t d_query = config.n_heads * config.head_dim, d_key = config.n_kv_heads * config.head_dim;
  switch (projection) {
    case Projection::q:
      return {d_query, config.d_model, config.qkv_bias};
    case Projection::k:
    case Projection::v:
      return {d_key, config.d_model, config.qkv_bias};
    case Projection::o:
      return {config.d_model, d_query, config.o_bias};
    case Projection::gate:
    case Projection::up:
      return {config.d_ff, config.d_model, config.mlp_bias};
    case Projection::down:
      return {config.d_model, config.d_ff, config.mlp_bias};
  }
  contract_violated("projection",
                    fmt::format("projection {} of {}", static_cast<int>(projection), kProjections));
}

std::string module_name(int64_t block, Projection projection) {
  const bool is_attention = projection <= Projection::o;
  return fmt::format("model.layers.{}.{}.{}", block, is_attention ? "self_attn" : "mlp", name_of(projection));
}

}  // namespace isobath::model
