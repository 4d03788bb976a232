#pragma once
#include <c10/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace isobath::model {

/// The seven linears of a Llama block, in the order in which a block applies them.
enum class Projection : int { q, k, v, o, gate, up, down };
inline constexpr int kProjections = 7;
/// "q_proj" … "down_proj".
[[nodiscard]] std::string_view name_of(Projection projection);

/// Modules that read the same input, in true-sequential order: {q,k,v} {o} {gate,up} {down}.
inline constexpr int kInputSets = 4;
[[nodiscard]] std::span<const Projection> input_set(int set);
/// "q/k/v", "o", "gate/up", "down".
[[nodiscard]] std::string_view name_of_input_set(int set);

/// Rotary position embedding parameters. Source: transformers' rope utilities; llama3: Llama 3.1 model card.
struct RopeConfig {
  enum class Type { standard, linear, llama3 };
  Type type = Type::standard;
  double theta = 10000.0;
  double factor = 1.0;
  double low_frequency_factor = 1.0;
  double high_frequency_factor = 4.0;
  int64_t original_max_position = 8192;
};

/// What config.json says of a model whose blocks are Llama's, or nearly.
struct ModelConfig {
  std::string
      architecture;  ///< "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM" or "Qwen3ForCausalLM"
  int64_t vocab_size = 0, d_model = 0, d_ff = 0, n_blocks = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0;
  int64_t max_position = 0;
  double rms_eps = 1e-5;
  bool tied_embeddings = false;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool head_norms = false;  ///< each head of q and k goes through an RMSNorm before it is rotated (Qwen3)
  /// Tokens that a token attends to at most, itself included; none: all before it. Longer sequences are
  /// refused (pipeline/validate.hpp).
  std::optional<int64_t> sliding_window;
  RopeConfig rope;
  at::ScalarType dtype = at::ScalarType::BFloat16;  ///< of the checkpoint
  std::optional<int64_t> bos_token;
};

struct ModuleShape {
  int64_t rows;     ///< d_out
  int64_t columns;  ///< d_in
  bool has_bias;
};

/// Reads and validates `directory`/config.json. Throws DataError: unsupported architecture (names what is
/// supported), missing or ill-typed key, unknown rope type, heads that do not divide.
[[nodiscard]] ModelConfig read_model_config(const std::filesystem::path& directory);

[[nodiscard]] ModuleShape module_shape(const ModelConfig& config, Projection projection);
/// Output rows that belong together: those of a head in q, k and v, 1 elsewhere.
[[nodiscard]] int64_t rows_of_head(const ModelConfig& config, Projection projection);
/// "model.layers.3.self_attn.q_proj".
[[nodiscard]] std::string module_name(int64_t block, Projection projection);

}  // namespace isobath::model
