#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <isobath/cli/compare.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <nlohmann/json.hpp>

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;

// f64 square roots of small whole numbers.
constexpr double kRounding = 1e-12;

class Compare : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("isobath-compare-" + std::to_string(::getpid()));
    fs::create_directories(root_ / "a");
    fs::create_directories(root_ / "b");
  }
  void TearDown() override { fs::remove_all(root_); }

  void write(const std::string& directory, int64_t block, const std::string& tokens,
             const std::vector<double>& alpha, const std::string& model = "tiny") const {
    io::Hdf5Writer file(root_ / directory / fmt::format("block-{:05d}.h5", block));
    file.attribute("/", "model", model);
    file.attribute("/", "tokens", tokens);
    const std::string group = "q_proj";
    file.write(group + "/alpha_per_token", at::tensor(alpha, at::kDouble));
    file.write(group + "/sum_x2", at::ones({std::ssize(alpha)}, at::kDouble));
    file.write(group + "/token_weights", at::ones({1, 4, 1}, at::kFloat));
    file.attribute(group, "module", fmt::format("model.layers.{}.self_attn.q_proj", block));
    file.attribute(group, "n_tokens", int64_t{4});
    file.commit();
  }
  [[nodiscard]] nlohmann::json compared() const {
    return nlohmann::json::parse(compare_json(root_ / "a", root_ / "b"));
  }

  fs::path root_;
};

TEST_F(Compare, PutsTheLeastAlikeFirst) {
  write("a", 0, "x", {1, 2});
  write("b", 0, "y", {2, 4});
  write("a", 1, "x", {3, 4});
  write("b", 1, "y", {4, 3});

  const auto result = compared();

  ASSERT_EQ(result["modules"].size(), 2U);
  EXPECT_EQ(result["modules"][0]["module"], "model.layers.1.self_attn.q_proj");
  EXPECT_NEAR(result["modules"][0]["cosine_alpha"].get<double>(), 0.96, kRounding);
  EXPECT_NEAR(result["modules"][1]["cosine_alpha"].get<double>(), 1, kRounding);
  EXPECT_EQ(result["modules"][1]["sensitivity_ratio"], 2);
  EXPECT_NEAR(result["mean_cosine_alpha"].get<double>(), 0.98, kRounding);
  EXPECT_TRUE(result["modules"][0]["cosine_d"].is_null());
  EXPECT_NE(compare_table(root_ / "a", root_ / "b", 1).find("The 1 least alike of 2 linears"),
            std::string::npos);
}

TEST_F(Compare, ComparesTokenWeightsOfTheSameTokensOnly) {
  write("a", 0, "x", {1, 2});
  write("b", 0, "x", {1, 2});

  const auto result = compared();

  EXPECT_TRUE(result["same_tokens"].get<bool>());
  EXPECT_NEAR(result["modules"][0]["cosine_d"].get<double>(), 1, kRounding);
}

TEST_F(Compare, TakesTheBlocksThatBothHave) {
  write("a", 0, "x", {1, 2});
  write("a", 1, "x", {1, 2});
  write("b", 1, "y", {1, 2});

  EXPECT_EQ(compared()["modules"].size(), 1U);
}

TEST_F(Compare, RefusesOtherModelsAndAbsentStatistics) {
  write("a", 0, "x", {1, 2});
  EXPECT_THROW((void)compared(), DataError);
  write("b", 0, "x", {1, 2}, "another");
  EXPECT_THROW((void)compared(), DataError);
  write("b", 0, "x", {1, 2, 3});
  EXPECT_THROW((void)compared(), DataError);
}

}  // namespace
}  // namespace isobath::cli
