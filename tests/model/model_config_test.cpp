#include <gtest/gtest.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/model/model_config.hpp>

#include "model/scratch_directory.hpp"

namespace isobath::model {
namespace {

class ModelConfigFile : public testing::Test {
 protected:
  /// A valid configuration with `extra` members first; a repeated key counts with its last value, so base
  /// values are left out by `without`.
  ModelConfig read(const std::string& extra, const std::string& without = "") {
    const std::vector<std::pair<std::string, std::string>> base = {
        {"architectures", R"(["LlamaForCausalLM"])"},
        {"vocab_size", "100"},
        {"hidden_size", "64"},
        {"intermediate_size", "96"},
        {"num_hidden_layers", "2"},
        {"num_attention_heads", "4"},
        {"rms_norm_eps", "1e-5"},
        {"max_position_embeddings", "512"}};
    std::string text = "{";
    for (const auto& [key, value] : base) {
      if (key != without) text += '"' + key + "\": " + value + ", ";
    }
    return read_text(text + (extra.empty() ? R"("torch_dtype": "bfloat16")" : extra) + "}");
  }
  ModelConfig read_text(const std::string& text) {
    std::ofstream(scratch_.path() / "config.json") << text;
    return read_model_config(scratch_.path());
  }
  /// The message of the DataError that reading gives; empty when it gives none.
  std::string complaint(const std::string& extra, const std::string& without = "") {
    try {
      (void)read(extra, without);
    } catch (const DataError& error) {
      return error.what();
    }
    return "";
  }
  static bool mentions(const std::string& message, const std::string& words) {
    return message.find(words) != std::string::npos;
  }

  ScratchDirectory scratch_{"model_config_test"};
};

TEST_F(ModelConfigFile, FillsAbsentKeysAsTransformersDoes) {
  const ModelConfig config = read("");

  EXPECT_EQ(config.n_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.rope.theta, 10000.0);
  EXPECT_EQ(config.rope.type, RopeConfig::Type::standard);
  EXPECT_FALSE(config.tied_embeddings || config.qkv_bias || config.o_bias || config.mlp_bias);
  EXPECT_FALSE(config.head_norms || config.sliding_window);
  EXPECT_EQ(config.bos_token, 1);
}

TEST_F(ModelConfigFile, NullMeansAbsent) {
  const ModelConfig config =
      read(R"("num_key_value_heads": null, "head_dim": null, "rope_scaling": null, "bos_token_id": null)");

  EXPECT_EQ(config.n_kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.bos_token, std::nullopt);
}

TEST_F(ModelConfigFile, ReadsTheOldSpellingOfRope) {
  const ModelConfig config = read(R"("rope_theta": 500000, "torch_dtype": "float16", "rope_scaling":
    {"type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192})");

  EXPECT_EQ(config.rope.type, RopeConfig::Type::llama3);
  EXPECT_EQ(config.rope.theta, 500000.0);
  EXPECT_EQ(config.rope.factor, 8.0);
  EXPECT_EQ(config.rope.original_max_position, 8192);
  EXPECT_EQ(config.dtype, at::kHalf);
}

TEST_F(ModelConfigFile, ReadsTheSpellingOfTransformers5) {
  const ModelConfig config = read(
      R"("dtype": "bfloat16", "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5000.0})");

  EXPECT_EQ(config.rope.type, RopeConfig::Type::linear);
  EXPECT_EQ(config.rope.theta, 5000.0);
  EXPECT_EQ(config.rope.factor, 2.5);
  EXPECT_EQ(config.dtype, at::kBFloat16);
}

TEST_F(ModelConfigFile, TakesTheOriginalContextFromMaxPositionWhenAbsent) {
  const ModelConfig config = read(
      R"("rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4})");

  EXPECT_EQ(config.rope.original_max_position, 512);
}

TEST_F(ModelConfigFile, NamesTheSupportedArchitectures) {
  const std::string message = complaint(R"("architectures": ["MambaForCausalLM"])", "architectures");

  EXPECT_TRUE(mentions(message, "MambaForCausalLM")) << message;
  for (const char* name : {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
    EXPECT_TRUE(mentions(message, name)) << message;
}

TEST_F(ModelConfigFile, ReadsWhatSetsMistralApart) {
  const std::string given = R"("architectures": ["MistralForCausalLM"], "num_key_value_heads": 2)";
  EXPECT_EQ(read(given, "architectures").sliding_window, 4096);
  EXPECT_EQ(read(given + R"(, "sliding_window": 128)", "architectures").sliding_window, 128);
  const ModelConfig config =
      read(given + R"(, "sliding_window": null, "attention_bias": true, "mlp_bias": true)", "architectures");
  EXPECT_FALSE(config.sliding_window);
  EXPECT_FALSE(config.qkv_bias || config.o_bias || config.mlp_bias)
      << "keys that MistralConfig does not know";
}

TEST_F(ModelConfigFile, ReadsWhatSetsQwen2Apart) {
  const std::string given =
      R"("architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 128)";
  const ModelConfig config = read(given, "architectures");
  EXPECT_TRUE(config.qkv_bias);
  EXPECT_FALSE(config.o_bias || config.mlp_bias || config.head_norms || config.sliding_window);
  EXPECT_EQ(config.bos_token, std::nullopt);
  EXPECT_TRUE(module_shape(config, Projection::k).has_bias);
  EXPECT_FALSE(module_shape(config, Projection::o).has_bias);
  EXPECT_EQ(read(given + R"(, "use_sliding_window": true)", "architectures").sliding_window, 128);
}

TEST_F(ModelConfigFile, ReadsWhatSetsQwen3Apart) {
  const std::string given = R"("architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2)";
  const ModelConfig config = read(given + R"(, "head_dim": 32)", "architectures");
  EXPECT_TRUE(config.head_norms);
  EXPECT_EQ(config.head_dim, 32);
  EXPECT_FALSE(config.qkv_bias || config.o_bias);
  EXPECT_TRUE(read(given + R"(, "head_dim": 32, "attention_bias": true)", "architectures").o_bias);
  EXPECT_TRUE(mentions(complaint(given, "architectures"), "head_dim"));
}

TEST_F(ModelConfigFile, AsksForKeyValueHeadsWhereTheirDefaultIsOneModels) {
  for (const char* name : {"MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
    EXPECT_TRUE(
        mentions(complaint(fmt::format(R"("architectures": ["{}"], "head_dim": 16)", name), "architectures"),
                 "num_key_value_heads"))
        << name;
}

TEST_F(ModelConfigFile, NamesAMissingKey) {
  for (const char* key : {"architectures", "vocab_size", "hidden_size", "intermediate_size",
                          "num_hidden_layers", "num_attention_heads"}) {
    const std::string message = complaint("", key);
    EXPECT_TRUE(mentions(message, key) && mentions(message, "missing")) << message;
  }
}

TEST_F(ModelConfigFile, NamesKeyAndValueOfABadType) {
  EXPECT_TRUE(mentions(complaint(R"("vocab_size": "many")", "vocab_size"), R"(found "many")"));
  EXPECT_TRUE(mentions(complaint(R"("hidden_size": 64.5)", "hidden_size"), "found 64.5"));
  EXPECT_TRUE(mentions(complaint(R"("attention_bias": 1)"), "true or false"));
  EXPECT_TRUE(mentions(complaint(R"("rope_theta": "1e4")"), "rope_theta"));
  EXPECT_TRUE(mentions(complaint(R"("rope_scaling": [1])"), "an object"));
  EXPECT_TRUE(mentions(complaint(R"("torch_dtype": "int8")"), "float32"));
  EXPECT_TRUE(mentions(complaint(R"("hidden_act": "gelu")"), "silu"));
}

TEST_F(ModelConfigFile, RefusesNumbersThatAreNoSizes) {
  EXPECT_TRUE(mentions(complaint(R"("vocab_size": 0)", "vocab_size"), "vocab_size"));
  EXPECT_TRUE(mentions(complaint(R"("hidden_size": -64)", "hidden_size"), "-64"));
  EXPECT_TRUE(mentions(complaint(R"("hidden_size": 18446744073709551615)", "hidden_size"), "hidden_size"));
  EXPECT_TRUE(
      mentions(complaint(R"("num_hidden_layers": 1000000000)", "num_hidden_layers"), "num_hidden_layers"));
  EXPECT_TRUE(mentions(complaint(R"("rms_norm_eps": -1e-5)", "rms_norm_eps"), "positive"));
  EXPECT_TRUE(mentions(complaint(R"("bos_token_id": 100)"), "[0, 100)"));
}

TEST_F(ModelConfigFile, RefusesHeadsThatDoNotDivide) {
  EXPECT_TRUE(mentions(complaint(R"("num_key_value_heads": 3)"), "not a multiple"));
  EXPECT_TRUE(mentions(complaint(R"("num_attention_heads": 5)", "num_attention_heads"), "not a multiple"));
  EXPECT_TRUE(mentions(complaint(R"("head_dim": 15)"), "odd"));
}

TEST_F(ModelConfigFile, RefusesRopeItDoesNotKnow) {
  const std::string message = complaint(R"("rope_scaling": {"type": "yarn", "factor": 2})");

  EXPECT_TRUE(mentions(message, "yarn") && mentions(message, "llama3")) << message;
  EXPECT_TRUE(mentions(complaint(R"("rope_scaling": {"type": "linear"})"), "rope_scaling.factor"));
  EXPECT_TRUE(mentions(complaint(R"("partial_rotary_factor": 0.5)"), "whole heads"));
}

TEST_F(ModelConfigFile, RefusesWhatIsNotAJsonObject) {
  EXPECT_THROW((void)read_text("{\"vocab_size\": "), DataError);
  EXPECT_THROW((void)read_text("[]"), DataError);
  EXPECT_THROW((void)read_text(""), DataError);
  EXPECT_THROW((void)read_model_config(scratch_.path() / "nowhere"), DataError);
}

TEST(InputSets, CoverTheSevenLinearsInOrder) {
  int next = 0;
  for (int set = 0; set < kInputSets; ++set) {
    for (const Projection projection : input_set(set)) EXPECT_EQ(static_cast<int>(projection), next++);
  }
  EXPECT_EQ(next, kProjections);
}

TEST(ModuleNames, AreThoseOfHuggingFace) {
  EXPECT_EQ(module_name(3, Projection::q), "model.layers.3.self_attn.q_proj");
  EXPECT_EQ(module_name(0, Projection::o), "model.layers.0.self_attn.o_proj");
  EXPECT_EQ(module_name(11, Projection::gate), "model.layers.11.mlp.gate_proj");
  EXPECT_EQ(module_name(11, Projection::down), "model.layers.11.mlp.down_proj");
}

}  // namespace
}  // namespace isobath::model
