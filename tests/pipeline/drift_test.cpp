#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/pipeline/drift.hpp>

namespace isobath::pipeline {
namespace {

// f64 sums of a few products.
constexpr double kRounding = 1e-9;

std::vector<int64_t> indices_of(const std::vector<data::Microbatch>& microbatches) {
  std::vector<int64_t> indices;
  for (const data::Microbatch& microbatch : microbatches) indices.push_back(microbatch.index);
  return indices;
}

TEST(ProbeMicrobatches, AreSpreadOverTheSet) {
  const data::ShardPlan shards(8, 4, 1);

  EXPECT_EQ(indices_of(probe_microbatches(shards, 3)), (std::vector<int64_t>{0, 2, 5}));
  EXPECT_EQ(indices_of(probe_microbatches(shards, 1)), (std::vector<int64_t>{0}));
  EXPECT_EQ(probe_microbatches(shards, 100).size(), 8U);
}

TEST(ProbeMicrobatches, HoldAtLeastTheSequencesAskedFor) {
  // Shards [0, 3) [3, 6) [6, 8) [8, 10): microbatches of 2, 1, 2, 1, 2, 2 sequences.
  const data::ShardPlan shards(10, 4, 2);

  for (int64_t n = 1; n <= 10; ++n) {
    int64_t n_held = 0;
    for (const data::Microbatch& microbatch : probe_microbatches(shards, n))
      n_held += microbatch.sequences.size();
    EXPECT_GE(n_held, n);
    EXPECT_LE(n_held, n + 2);
  }
}

config::Sensitivity sensitivity_of(double clip_quantile, double exponent = 1) {
  config::Sensitivity sensitivity;
  sensitivity.clip_quantile = clip_quantile;
  sensitivity.exponent = exponent;
  return sensitivity;
}

at::Tensor weights_of(std::initializer_list<double> values) {
  return at::tensor(std::vector<double>(values)).to(at::kFloat).reshape({1, -1, 1});
}

TEST(TokenWeightCosine, ComparesDirectionsAndNotSizes) {
  const config::Sensitivity plain = sensitivity_of(1);
  const at::Tensor d = weights_of({1, 2, 0, 4});

  EXPECT_NEAR(token_weight_cosine(d, 3 * d, plain), 1, kRounding);
  EXPECT_EQ(token_weight_cosine(weights_of({1, 0, 0, 0}), weights_of({0, 1, 0, 0}), plain), 0);
  // (3·4 + 4·3) / (5·5).
  EXPECT_NEAR(token_weight_cosine(weights_of({3, 4}), weights_of({4, 3}), plain), 0.96, kRounding);
  EXPECT_EQ(token_weight_cosine(weights_of({0, 0}), weights_of({4, 3}), plain), 0);
}

TEST(TokenWeightCosine, SeesTheWeightsAsTheSolverUsesThem) {
  const at::Tensor before = weights_of({1, 1, 1, 1000}), after = weights_of({1, 1, 1, 9});

  // Clipped at the middle of the four, and with an exponent of 0, all tokens weigh the same in both.
  EXPECT_NEAR(token_weight_cosine(before, after, sensitivity_of(0.5)), 1, kRounding);
  EXPECT_NEAR(token_weight_cosine(before, after, sensitivity_of(1, 0)), 1, kRounding);
  EXPECT_LT(token_weight_cosine(before, after, sensitivity_of(1)), 0.999);
}

TEST(TokenWeightCosine, IsTheMeanOverRowGroups) {
  const at::Tensor before = at::cat({weights_of({1, 0}), weights_of({3, 4})}, 2),
                   after = at::cat({weights_of({0, 1}), weights_of({4, 3})}, 2);

  EXPECT_NEAR(token_weight_cosine(before, after, sensitivity_of(1)), 0.48, kRounding);
}

}  // namespace
}  // namespace isobath::pipeline
