#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <isobath/cli/inspect.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/io/safetensors_writer.hpp>
#include <nlohmann/json.hpp>

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;

class Inspect : public ::testing::Test {
 protected:
  void SetUp() override {
    run_ = fs::temp_directory_path() / ("isobath-inspect-" + std::to_string(::getpid()));
    fs::create_directories(run_ / "measure");
  }
  void TearDown() override { fs::remove_all(run_); }

  /// A block file of two modules with two channels and four tokens; `scale` multiplies α.
  void write_block(int64_t block, double scale, const std::string& model = "tiny") const {
    write_block(block, model, [&](io::Hdf5Writer& file) {
      write_module(file, "q_proj", scale, true);
      write_module(file, "down_proj", 2 * scale, false);
    });
  }

  void write_block(int64_t block, const std::string& model,
                   const std::function<void(io::Hdf5Writer&)>& write_modules) const {
    io::Hdf5Writer file(run_ / "measure" / fmt::format("block-{:05d}.h5", block));
    file.attribute("/", "model", model);
    file.attribute("/", "loss", std::string("nll"));
    file.attribute("/", "n_sequences", std::string("1"));
    file.attribute("/", "length", std::string("4"));
    file.attribute("/", "block", block);
    write_modules(file);
    file.commit();
  }

  /// token_weights: four tokens × row groups. Two equal tokens, two without weight: n_eff = 2.
  static void write_module(io::Hdf5Writer& file, const std::string& group, double scale,
                           bool with_per_sequence,
                           const at::Tensor& token_weights = at::tensor({2.0, 2.0, 0.0, 0.0})) {
    const auto f64 = at::TensorOptions(at::kDouble);
    file.write(group + "/token_weights", token_weights.to(at::kFloat).reshape({1, 4, -1}));
    file.write(group + "/max_abs_x", at::tensor({1.5, 7.0}, f64).to(at::kFloat));
    file.write(group + "/alpha_per_token", at::tensor({1.0, 3.0}, f64) * scale);
    if (with_per_sequence) file.write(group + "/alpha_per_sequence", at::tensor({4.0, 1.0}, f64) * scale);
    file.attribute(group, "n_tokens", int64_t{4});
  }

  fs::path run_;
};

TEST_F(Inspect, SortsModulesOfAllBlocksBySensitivityPerToken) {
  write_block(0, 1);
  write_block(1, 10);

  const auto result = nlohmann::json::parse(inspect_json(run_));

  ASSERT_EQ(result["modules"].size(), 4U);
  const auto& first = result["modules"][0];
  EXPECT_EQ(first["block"], 1);
  EXPECT_EQ(first["module"], "down_proj");
  EXPECT_EQ(first["alpha_per_token_sum"], 80.0);
  EXPECT_EQ(first["sensitivity_per_token"], 20.0);
  EXPECT_TRUE(first["cross_token_mass"].is_null());
  EXPECT_EQ(first["n_effective"], 2.0);
  EXPECT_EQ(first["n_effective_over_d_in"], 1.0);
  EXPECT_EQ(first["max_abs_x"], 7.0);
  EXPECT_EQ(first["top_channel"], 1);
  EXPECT_EQ(first["top_channel_share"], 0.75);
  constexpr double kRoundingOfF64 = 1e-12;  // 1 - 4/5 is not exact in binary
  EXPECT_NEAR(result["modules"][1]["cross_token_mass"].get<double>(), 0.2, kRoundingOfF64);
}

TEST_F(Inspect, EffectiveTokensAreThoseOfTheMeanOverOutputChannels) {
  // One group of rows weighs the first token by 4, another the second: with 3 and 1 rows the means are 3 and
  // 1, n_eff = 16/10; groups of one size weigh both alike.
  const auto effective = [&](const std::vector<int64_t>& sizes) {
    write_block(0, "tiny", [&](io::Hdf5Writer& file) {
      write_module(file, "k_proj", 1, false, at::tensor({4.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0}));
      if (!sizes.empty()) file.write("k_proj/row_group_sizes", at::tensor(sizes, at::kLong));
    });
    const auto result = nlohmann::json::parse(inspect_json(run_));
    return result["modules"][0]["n_effective"].get<double>();
  };

  EXPECT_DOUBLE_EQ(effective({3, 1}), 1.6);
  EXPECT_DOUBLE_EQ(effective({1, 3}), 1.6);
  EXPECT_DOUBLE_EQ(effective({2, 2}), 2.0);
  EXPECT_DOUBLE_EQ(effective({}), 2.0);
}

TEST_F(Inspect, TheTableShowsTheAskedNumberOfRows) {
  write_block(0, 1);
  write_block(1, 10);

  const std::string table = inspect_table(run_ / "measure", 1);

  EXPECT_NE(table.find("4 modules of 2 blocks; model tiny, loss nll, 1 sequences of 4 tokens"),
            std::string::npos)
      << table;
  EXPECT_NE(table.find("8.000e+01"), std::string::npos) << table;
  EXPECT_EQ(table.find("q_proj"), std::string::npos) << table;
}

TEST_F(Inspect, ASingleFileShowsItsModulesOnly) {
  write_block(0, 1);
  write_block(1, 10);

  const auto result = nlohmann::json::parse(inspect_json(run_ / "measure" / "block-00000.h5"));

  EXPECT_EQ(result["modules"].size(), 2U);
}

TEST_F(Inspect, ChannelsOfAllModulesAreSortedPerToken) {
  write_block(0, 1);
  write_block(1, 10);

  const auto found = nlohmann::json::parse(
      inspect_parts(run_, {.by = Granularity::channel, .n_rows = 3, .as_json = true}))["channels"];

  // 10 · 2 · {1, 3} and 10 · {1, 3} over 4 tokens.
  ASSERT_EQ(found.size(), 3U);
  EXPECT_EQ(found[0], (nlohmann::json{{"block", 1},
                                      {"module", "down_proj"},
                                      {"channel", 1},
                                      {"max_abs_x", 7.0},
                                      {"sensitivity_per_token", 15.0},
                                      {"share", 0.75}}));
  EXPECT_EQ(found[1]["module"], "q_proj");
  EXPECT_EQ(found[1]["sensitivity_per_token"], 7.5);
  EXPECT_EQ(found[2]["module"], "down_proj");
  EXPECT_EQ(found[2]["channel"], 0);
}

TEST_F(Inspect, BlocksAddTheirModules) {
  write_block(0, 1);
  write_block(1, 3);

  const auto found =
      nlohmann::json::parse(inspect_parts(run_, {.by = Granularity::block, .as_json = true}))["blocks"];

  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(found[0], (nlohmann::json{{"block", 1},
                                      {"most_sensitive_module", "down_proj"},
                                      {"sensitivity_per_token", 9.0},
                                      {"share", 0.75}}));
  EXPECT_NE(inspect_parts(run_, {.by = Granularity::block, .n_rows = 1}).find("75.00 %"), std::string::npos);
}

TEST_F(Inspect, WeightsHaveTheSaliencyOfTheirChannel) {
  const at::Tensor q = at::tensor({1.0, -2.0, 0.5, 4.0}).to(at::kFloat).reshape({2, 2});
  io::write_safetensors(
      run_ / "model.safetensors",
      {{"model.layers.0.self_attn.q_proj.weight", q}, {"model.layers.0.mlp.down_proj.weight", 0.1 * q}}, {});
  write_block(0, 1, io::ShardedReader(run_).fingerprint());
  const PartsRequest request{.by = Granularity::weight, .n_rows = 3, .as_json = true, .model = run_};

  const auto found = nlohmann::json::parse(inspect_parts(run_, request))["weights"];

  // q: ½ · {1, 3} / (4 tokens · 2 rows) · w² = 1/16 · {1 · 1, 3 · 4; 1 · 0.25, 3 · 16}.
  ASSERT_EQ(found.size(), 3U);
  EXPECT_EQ(found[0]["module"], "q_proj");
  EXPECT_EQ(found[0]["row"], 1);
  EXPECT_EQ(found[0]["channel"], 1);
  EXPECT_EQ(found[0]["weight"], 4.0);
  EXPECT_EQ(found[0]["saliency_per_token"], 3.0);
  EXPECT_EQ(found[0]["share"], 48.0 / 61.25);
  EXPECT_EQ(found[1]["weight"], -2.0);
  EXPECT_EQ(found[1]["saliency_per_token"], 0.75);
  EXPECT_EQ(found[2]["module"], "q_proj");

  write_block(0, 1, "another");
  EXPECT_THROW((void)inspect_parts(run_, request), DataError);
  fs::remove(run_ / "model.safetensors");
  EXPECT_THROW((void)inspect_parts(run_, request), DataError);
}

TEST_F(Inspect, AbsentOrForeignFilesAreDataErrors) {
  EXPECT_THROW((void)inspect_table(run_ / "nowhere", 1), DataError);
  EXPECT_THROW((void)inspect_table(run_, 1), DataError);
  io::Hdf5Writer foreign(run_ / "measure" / "block-00000.h5");
  foreign.write("x", at::zeros({2}));
  foreign.commit();
  EXPECT_THROW((void)inspect_table(run_, 1), DataError);
  EXPECT_THROW((void)inspect_parts(run_, {}), DataError);
}

}  // namespace
}  // namespace isobath::cli
