#include <gtest/gtest.h>
#include <isobath/core/error.hpp>
#include <isobath/core/partition.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <isobath/sensitivity/token_weights.hpp>
#include <sensitivity/golden.hpp>
#include <sensitivity/near.hpp>

namespace isobath::sensitivity {
namespace {

using testing::relative_error;

// f32 sums of a few hundred positive terms.
constexpr double kSingleTolerance = 1e-5;

TEST(TokenWeights, AreTheMeanSquareOfEachRowGroup) {
  at::manual_seed(1);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor gradient = at::randn({2, 7, 301}).to(dtype);
    for (const int64_t row_groups : {1, 2, 4}) {
      const at::Tensor weights = token_weights(gradient, row_groups);
      ASSERT_EQ(weights.sizes(), (at::IntArrayRef{2, 7, row_groups}));
      EXPECT_EQ(weights.scalar_type(), at::kFloat);
      for (int64_t k = 0; k < row_groups; ++k) {
        const Range rows = partition(301, row_groups, k);
        const at::Tensor expected = gradient.to(at::kDouble).slice(2, rows.begin, rows.end).square().mean(2);
        EXPECT_LT(relative_error(weights.select(2, k), expected), kSingleTolerance);
      }
    }
  }
}

TEST(TokenWeights, AgreeWithTheOracle) {
  for (const char* name : testing::kGoldenModules) {
    const testing::GoldenModule golden(name);
    for (const int64_t row_groups : {1, 2, 3})
      EXPECT_LT(relative_error(token_weights(golden["gradient"], row_groups),
                               golden[fmt::format("token_weights_{}", row_groups)]),
                testing::kGoldenTolerance)
          << name << ", " << row_groups << " row groups";
  }
}

TEST(RowRanges, KeepUnitsWhole) {
  EXPECT_EQ(row_ranges(12, 2, 1).ranges, (std::vector<Range>{{0, 6}, {6, 12}}));
  // Three heads of four rows in two groups.
  EXPECT_EQ(row_ranges(12, 2, 4).ranges, (std::vector<Range>{{0, 8}, {8, 12}}));
  EXPECT_THROW((void)row_ranges(12, 4, 4), InternalError);
  EXPECT_THROW((void)row_ranges(12, 2, 5), InternalError);
}

TEST(TokenWeights, OfGivenGroupsAreTheirMeanSquares) {
  const at::Tensor gradient = at::arange(1, 7, at::kFloat).view({1, 1, 6});

  const at::Tensor weights = token_weights(gradient, row_ranges(6, 2, 2));

  EXPECT_LT(relative_error(weights.flatten(), at::tensor({(1. + 4 + 9 + 16) / 4, (25. + 36) / 2})),
            kSingleTolerance);
}

// More tokens than are squared at a time.
TEST(TokenWeights, OfScatteredGroupsAreTheirMeanSquares) {
  at::manual_seed(2);
  const RowGroups groups{.order = at::tensor({1, 4, 6, 0, 2, 3, 5}, at::kLong), .ranges = {{0, 3}, {3, 7}}};
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor gradient = at::randn({3, 70, 7}).to(dtype);

    const at::Tensor weights = token_weights(gradient, groups);

    const at::Tensor squares = gradient.to(at::kDouble).square();
    const at::Tensor expected = at::stack({squares.index_select(2, groups.order.slice(0, 0, 3)).mean(2),
                                           squares.index_select(2, groups.order.slice(0, 3, 7)).mean(2)},
                                          2);
    EXPECT_LT(relative_error(weights, expected), kSingleTolerance);
  }
}

TEST(MeanOverChannels, CountsEveryOutputChannelOnce) {
  at::manual_seed(3);
  const RowGroups groups{.order = at::tensor({1, 4, 6, 0, 2, 3, 5}, at::kLong), .ranges = {{0, 2}, {2, 7}}};
  const at::Tensor gradient = at::randn({3, 9, 7});

  const at::Tensor mean = mean_over_channels(token_weights(gradient, groups), groups.ranges);

  EXPECT_LT(relative_error(mean, gradient.to(at::kDouble).square().mean(2)), kSingleTolerance);
  const RowGroups whole = row_ranges(7, 1, 1);
  EXPECT_TRUE(at::equal(mean_over_channels(token_weights(gradient, whole), whole.ranges),
                        token_weights(gradient, whole).select(2, 0)));
}

TEST(TokenWeights, OfAZeroGradientAreZero) {
  EXPECT_EQ(token_weights(at::zeros({1, 3, 8}, at::kBFloat16), 2).abs().max().item<float>(), 0.0F);
}

TEST(ClipThreshold, IsTheInterpolatedQuantileOfThePositiveWeights) {
  // numpy.quantile([1, 2, 3, 4, 10], [0, 0.25, 0.6, 0.9, 1]) = [1, 2, 3.4, 7.6, 10]; zeros are padding.
  const at::Tensor d = at::tensor({10.0F, 0.0F, 2.0F, 4.0F, 0.0F, 1.0F, 3.0F, 0.0F}).view({2, 4});
  EXPECT_DOUBLE_EQ(clip_threshold(d, 0.0), 1.0);
  EXPECT_DOUBLE_EQ(clip_threshold(d, 0.25), 2.0);
  EXPECT_DOUBLE_EQ(clip_threshold(d, 0.6), 3.4);
  EXPECT_DOUBLE_EQ(clip_threshold(d, 0.9), 7.6);
  EXPECT_DOUBLE_EQ(clip_threshold(d, 1.0), 10.0);
}

TEST(ClipThreshold, LeavesItsInputAloneAndAcceptsOneOrNoPositiveWeight) {
  const at::Tensor d = at::tensor({3.0F, 1.0F, 2.0F});
  const at::Tensor before = d.clone();
  (void)clip_threshold(d, 0.5);
  EXPECT_TRUE(at::equal(d, before));
  EXPECT_DOUBLE_EQ(clip_threshold(at::tensor({0.0F, 5.0F}), 0.3), 5.0);
  EXPECT_DOUBLE_EQ(clip_threshold(at::zeros({4}), 0.999), 0.0);
  EXPECT_THROW((void)clip_threshold(d, 1.5), InternalError);
}

TEST(Robust, ClipsThenRaisesToTheExponentAndKeepsZeros) {
  const at::Tensor d = at::tensor({0.0F, 1.0F, 4.0F, 100.0F});
  EXPECT_TRUE(at::equal(robust(d, 9.0, 1.0), at::tensor({0.0F, 1.0F, 4.0F, 9.0F})));
  EXPECT_TRUE(at::allclose(robust(d, 9.0, 0.5), at::tensor({0.0F, 1.0F, 2.0F, 3.0F})));
  EXPECT_TRUE(at::equal(robust(d, 9.0, 0.0), at::tensor({0.0F, 1.0F, 1.0F, 1.0F})))
      << "padding stays without weight";
  EXPECT_EQ(robust(d, 9.0, 0.5).scalar_type(), at::kFloat);
}

TEST(Shrunk, MixesInTheCovarianceOfEqualTokensAndKeepsTheTrace) {
  at::manual_seed(8);
  const at::Tensor x = at::randn({30, 4}, at::kDouble), real = at::arange(30) < 25;
  const at::Tensor d = at::rand({30}).masked_fill(real.logical_not(), 0.0);
  const at::Tensor h_d = covariance_reference(x, d), h_1 = covariance_reference(x, real.to(at::kDouble));
  const double ratio = (h_d.trace() / h_1.trace()).item<double>();
  for (const double rho : {0.0, 0.3, 1.0}) {
    const at::Tensor h = covariance_reference(x, shrunk(d, real, rho, ratio));
    EXPECT_TRUE(at::allclose(h, (1 - rho) * h_d + rho * ratio * h_1, 1e-6)) << rho;
    EXPECT_NEAR((h.trace() / h_d.trace()).item<double>(), 1, 1e-6) << rho;
  }
  EXPECT_TRUE(at::equal(shrunk(d, real, 0, ratio), d));
  EXPECT_TRUE((shrunk(d, {}, 0.5, 1) > 0).all().item<bool>());
}

TEST(Shrunk, AutomaticShrinkageFallsWithTheTokensThatCount) {
  EXPECT_DOUBLE_EQ(automatic_shrinkage(0, 64), 1);
  EXPECT_DOUBLE_EQ(automatic_shrinkage(64, 64), 0.5);
  EXPECT_DOUBLE_EQ(automatic_shrinkage(192, 64), 0.25);
}

TEST(EffectiveSamples, CountEqualWeightsFullyAndASpikeOnce) {
  EXPECT_DOUBLE_EQ(effective_samples(5 * 2.0, 5 * 4.0), 5.0);
  EXPECT_DOUBLE_EQ(effective_samples(7.0, 49.0), 1.0);
  EXPECT_DOUBLE_EQ(effective_samples(0.0, 0.0), 0.0);
}

}  // namespace
}  // namespace isobath::sensitivity
