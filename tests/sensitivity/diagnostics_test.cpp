#include <gtest/gtest.h>

#include <isobath/sensitivity/diagnostics.hpp>

namespace isobath::sensitivity {
namespace {

// A few sums of small whole and half numbers.
constexpr double kRounding = 1e-12;

TEST(Ranks, EqualValuesShareTheMeanOfTheirRanks) {
  const std::vector<double> values{10, 30, 10, 20};

  EXPECT_EQ(ranks_of(values), (std::vector<double>{1.5, 4, 1.5, 3}));
}

TEST(RankCorrelation, SeesOrderAndNotSize) {
  const std::vector<double> a{1, 2, 3, 4}, b{1, 10, 100, 1000}, falling{4, 3, 2, 1}, mixed{1, 3, 2, 4};

  EXPECT_NEAR(rank_correlation(a, b), 1, kRounding);
  EXPECT_NEAR(rank_correlation(a, falling), -1, kRounding);
  // 1 − 6 Σd² / (n (n² − 1)) with d = 0, 1, −1, 0.
  EXPECT_NEAR(rank_correlation(a, mixed), 0.8, kRounding);
}

TEST(RankCorrelation, OfAConstantIsZero) {
  EXPECT_EQ(rank_correlation(std::vector<double>{1, 1, 1}, std::vector<double>{1, 2, 3}), 0);
  EXPECT_EQ(rank_correlation(std::vector<double>{}, std::vector<double>{}), 0);
}

TEST(PrecisionAt, CountsThePredictedAmongTheMeasured) {
  const std::vector<double> predicted{9, 8, 7, 1, 2}, measured{5, 1, 6, 7, 0};

  EXPECT_NEAR(precision_at(predicted, measured, 3), 2.0 / 3, kRounding);
  EXPECT_EQ(precision_at(predicted, measured, 10), 1);
  EXPECT_EQ(precision_at({}, {}, 3), 1);
}

TEST(Largest, TakesTheFirstOfEqualValues) {
  EXPECT_EQ(largest(std::vector<double>{1, 3, 3, 2}, 2), (std::vector<int64_t>{1, 2}));
}

}  // namespace
}  // namespace isobath::sensitivity
