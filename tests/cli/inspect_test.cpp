#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <isobath/cli/inspect.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
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
  void write_block(int64_t block, double scale) const {
    io::Hdf5Writer file(run_ / "measure" / fmt::format("block-{:05d}.h5", block));
    file.attribute("/", "model", std::string("tiny"));
    file.attribute("/", "loss", std::string("nll"));
    file.attribute("/", "n_sequences", std::string("1"));
    file.attribute("/", "length", std::string("4"));
    file.attribute("/", "block", block);
    write_module(file, "q_proj", scale, true);
    write_module(file, "down_proj", 2 * scale, false);
    file.commit();
  }

  static void write_module(io::Hdf5Writer& file, const std::string& group, double scale,
                           bool with_per_sequence) {
    const auto f64 = at::TensorOptions(at::kDouble);
    // Two equal tokens, two without weight: n_eff = 2.
    file.write(group + "/token_weights",
               at::tensor({2.0, 2.0, 0.0, 0.0}, f64).to(at::kFloat).reshape({1, 4, 1}));
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

TEST_F(Inspect, AbsentOrForeignFilesAreDataErrors) {
  EXPECT_THROW((void)inspect_table(run_ / "nowhere", 1), DataError);
  EXPECT_THROW((void)inspect_table(run_, 1), DataError);
  io::Hdf5Writer foreign(run_ / "measure" / "block-00000.h5");
  foreign.write("x", at::zeros({2}));
  foreign.commit();
  EXPECT_THROW((void)inspect_table(run_, 1), DataError);
}

}  // namespace
}  // namespace isobath::cli
