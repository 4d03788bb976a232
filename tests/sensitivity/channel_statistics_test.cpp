#include <gtest/gtest.h>
#include <isobath/core/error.hpp>
#include <isobath/sensitivity/channel_statistics.hpp>
#include <limits>
#include <sensitivity/golden.hpp>
#include <sensitivity/near.hpp>

namespace isobath::sensitivity {
namespace {

using testing::GoldenModule;
using testing::relative_error;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint64_t kSeed = 11;

ChannelStatistics observe_golden(const GoldenModule& golden, PerSequence per_sequence, int64_t n_probes) {
  const at::Tensor x = golden["x"];
  ChannelStatistics statistics(x.size(2), per_sequence, n_probes, kSeed);
  statistics.observe(x, golden["gradient"], golden.mask(), 0, 0);
  return statistics;
}

TEST(ChannelStatistics, AgreesWithTheOracleOfFullWeightGradients) {
  for (const char* name : testing::kGoldenModules) {
    const GoldenModule golden(name);
    const ChannelStatistics statistics = observe_golden(golden, PerSequence::exact, 0);
    EXPECT_LT(relative_error(statistics.sum_squares(), golden["sum_x2"]), testing::kGoldenTolerance) << name;
    EXPECT_LT(relative_error(statistics.maxima(), golden["max_abs_x"]), testing::kGoldenTolerance) << name;
    EXPECT_LT(relative_error(statistics.alpha_per_token(), golden["alpha_per_token"]),
              testing::kGoldenTolerance)
        << name;
    EXPECT_LT(relative_error(statistics.alpha_per_sequence(), golden["alpha_per_sequence"]),
              testing::kGoldenTolerance)
        << name;
    EXPECT_EQ(statistics.n_tokens(), golden.mask().sum().item<int64_t>());
    EXPECT_EQ(statistics.n_sequences(), 4);
  }
}

TEST(ChannelStatistics, ProbesConvergeToTheExactPerSequenceEstimator) {
  // One probe's relative variance is at most 2; over n probes and 4 sequences the mean of the channels'
  // errors stays within a few times sqrt(2 / n), and the sum over channels much closer.
  constexpr int64_t kProbes = 4096;
  constexpr double kChannelTolerance = 0.15, kTotalTolerance = 0.03;
  const GoldenModule golden("down");
  const at::Tensor exact = golden["alpha_per_sequence"];
  const at::Tensor estimate = observe_golden(golden, PerSequence::probes, kProbes).alpha_per_sequence();
  EXPECT_LT(((estimate - exact).abs() / exact).max().item<double>(), kChannelTolerance);
  EXPECT_NEAR((estimate.sum() / exact.sum()).item<double>(), 1.0, kTotalTolerance);
}

TEST(ChannelStatistics, ProbesDependOnSequenceAndSampleButNotOnTheMicrobatch) {
  const GoldenModule golden("k");
  const at::Tensor x = golden["x"], gradient = golden["gradient"], mask = golden.mask();
  const ChannelStatistics together = observe_golden(golden, PerSequence::probes, 3);
  ChannelStatistics apart(x.size(2), PerSequence::probes, 3, kSeed);
  for (int64_t s = 0; s < x.size(0); ++s)
    apart.observe(x.slice(0, s, s + 1), gradient.slice(0, s, s + 1), mask.slice(0, s, s + 1), s, 0);
  EXPECT_TRUE(at::equal(together.sums(), apart.sums()));
  EXPECT_TRUE(at::equal(together.maxima(), apart.maxima()));

  const auto estimate = [&](int64_t sequence, int64_t sample) {
    ChannelStatistics one(x.size(2), PerSequence::probes, 1, kSeed);
    one.observe(x.slice(0, 0, 1), gradient.slice(0, 0, 1), {}, sequence, sample);
    return one.alpha_per_sequence();
  };
  EXPECT_FALSE(at::equal(estimate(0, 0), estimate(1, 0)));
  EXPECT_FALSE(at::equal(estimate(0, 0), estimate(0, 1)));
  EXPECT_TRUE(at::equal(estimate(2, 1), estimate(2, 1)));
}

TEST(ChannelStatistics, IgnoresPaddingWhateverItHolds) {
  at::manual_seed(2);
  at::Tensor x = at::randn({2, 6, 5}), gradient = at::randn({2, 6, 4});
  at::Tensor mask = at::ones({2, 6}, at::kBool);
  mask[1].slice(0, 4, 6).fill_(false);
  ChannelStatistics expected(5, PerSequence::exact, 0, kSeed), found(5, PerSequence::exact, 0, kSeed);
  expected.observe(x.slice(0, 0, 1), gradient.slice(0, 0, 1), {}, 0, 0);
  expected.observe(x.slice(0, 1, 2).slice(1, 0, 4), gradient.slice(0, 1, 2).slice(1, 0, 4), {}, 1, 0);
  x[1].slice(0, 4, 6).fill_(kNan);
  gradient[1].slice(0, 4, 6).fill_(1e30F);
  found.observe(x, gradient, mask, 0, 0);
  // Products of another shape sum in another order.
  EXPECT_TRUE(at::allclose(found.sums(), expected.sums(), 1e-5));
  EXPECT_TRUE(at::equal(found.maxima(), expected.maxima()));
  EXPECT_EQ(found.n_tokens(), 10);
}

TEST(ChannelStatistics, CountsActivationsOnceForSeveralLabelSamples) {
  at::manual_seed(4);
  const at::Tensor x = at::randn({1, 8, 3}), gradient = at::randn({1, 8, 2});
  ChannelStatistics once(3, PerSequence::exact, 0, kSeed), twice(3, PerSequence::exact, 0, kSeed);
  once.observe(x, gradient, {}, 0, 0);
  twice.observe(x, gradient, {}, 0, 0);
  twice.observe(x, gradient, {}, 0, 1);
  EXPECT_TRUE(at::equal(twice.sum_squares(), once.sum_squares()));
  EXPECT_TRUE(at::equal(twice.alpha_per_token(), 2 * once.alpha_per_token()));
  EXPECT_TRUE(at::equal(twice.alpha_per_sequence(), 2 * once.alpha_per_sequence()));
  EXPECT_EQ(twice.n_tokens(), 8);
  EXPECT_EQ(twice.n_sequences(), 1);
}

TEST(ChannelStatistics, IsRestoredFromItsSums) {
  const ChannelStatistics statistics = observe_golden(GoldenModule("o"), PerSequence::exact, 0);
  const auto restored = ChannelStatistics::from(statistics.sums(), statistics.maxima());
  EXPECT_TRUE(at::equal(restored.alpha_per_sequence(), statistics.alpha_per_sequence()));
  EXPECT_TRUE(at::equal(restored.maxima(), statistics.maxima()));
  EXPECT_EQ(restored.n_tokens(), statistics.n_tokens());
  EXPECT_EQ(statistics.sums().sizes(), (at::IntArrayRef{5, 64}));
  EXPECT_THROW((void)ChannelStatistics::from(at::zeros({4, 3}, at::kDouble), at::zeros({3})), InternalError);
}

TEST(ChannelStatistics, KeepsTheExactMaximumOfBf16Activations) {
  at::manual_seed(8);
  const at::Tensor x = (at::randn({1, 50, 9}) * 37).to(at::kBFloat16);
  ChannelStatistics statistics(9, PerSequence::off, 0, kSeed);
  statistics.observe(x, at::ones({1, 50, 2}, at::kBFloat16), {}, 0, 0);
  EXPECT_TRUE(at::equal(statistics.maxima(), x[0].to(at::kFloat).abs().amax(0)));
}

TEST(ChannelStatistics, NamesChannelSequenceAndTokenOfANonFiniteValue) {
  const auto message_of = [](at::Tensor x, at::Tensor gradient) -> std::string {
    ChannelStatistics statistics(4, PerSequence::off, 0, kSeed);
    try {
      statistics.observe(x, gradient, {}, 20, 0);
    } catch (const NumericError& error) {
      EXPECT_EQ(statistics.n_sequences(), 1) << "the sequences before the bad one were taken";
      return error.what();
    }
    return "accepted";
  };
  const at::Tensor good_x = at::ones({2, 5, 4}), good_gradient = at::ones({2, 5, 3});
  at::Tensor bad = good_x.clone();
  bad[1][3][2] = kNan;
  EXPECT_NE(message_of(bad, good_gradient).find("activation nan in channel 2 at sequence 21, token 3"),
            std::string::npos)
      << message_of(bad, good_gradient);
  at::Tensor bad_gradient = good_gradient.clone();
  bad_gradient[1][0][1] = -std::numeric_limits<float>::infinity();
  EXPECT_NE(message_of(good_x, bad_gradient).find("gradient -inf in channel 1 at sequence 21, token 0"),
            std::string::npos)
      << message_of(good_x, bad_gradient);
  at::Tensor huge = good_x.clone();
  huge[1][1][1] = 1e30F;
  EXPECT_NE(message_of(huge, good_gradient).find("overflow"), std::string::npos);
}

}  // namespace
}  // namespace isobath::sensitivity
