#include <gtest/gtest.h>

#include <isobath/core/random.hpp>
#include <set>

namespace isobath {
namespace {

using Words = std::array<uint32_t, 4>;

// The vectors `philox4x32 10` of the file kat_vectors of Random123.
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(CounterRandom, DependsOnEveryPartOfKeyAndCounter) {
  const CounterRandom random(1, RandomPurpose::fisher_label);
  const std::set<Words> all = {
      random.words(0, 0, 0),
      random.words(1, 0, 0),
      random.words(0, 1, 0),
      random.words(0, 0, 1),
      random.words(uint64_t{1} << 32, 0, 0),
      CounterRandom(2, RandomPurpose::fisher_label).words(0, 0, 0),
      CounterRandom(uint64_t{1} << 32 | 1, RandomPurpose::fisher_label).words(0, 0, 0),
      CounterRandom(1, RandomPurpose::probe_sign).words(0, 0, 0),
      CounterRandom(1, RandomPurpose::sequence_sample).words(0, 0, 0),
  };
  EXPECT_EQ(all.size(), 9u);
}

TEST(CounterRandom, IsTheSameForWhoeverAsksInWhateverOrder) {
  const CounterRandom first(7, RandomPurpose::probe_sign), second(7, RandomPurpose::probe_sign);
  const double later = first.uniform(3, 4, 5);
  static_cast<void>(second.uniform(9, 9, 9));
  EXPECT_EQ(second.uniform(3, 4, 5), later);
}

TEST(CounterRandom, IsUniform) {
  const CounterRandom random(11, RandomPurpose::sequence_sample);
  constexpr int kSamples = 100000;
  // Five standard errors of the mean, 1 / sqrt(12 n), and of the second moment, sqrt(4 / 45 / n).
  const double mean_tolerance = 5 / std::sqrt(12.0 * kSamples),
               square_tolerance = 5 * std::sqrt(4.0 / 45 / kSamples);
  double mean = 0, mean_square = 0;
  for (int i = 0; i < kSamples; ++i) {
    const double value = random.uniform(static_cast<uint64_t>(i / 100), static_cast<uint32_t>(i % 100), 0);
    ASSERT_GE(value, 0.0);
    ASSERT_LT(value, 1.0);
    mean += value / kSamples;
    mean_square += value * value / kSamples;
  }
  EXPECT_NEAR(mean, 0.5, mean_tolerance);
  EXPECT_NEAR(mean_square, 1.0 / 3, square_tolerance);
}

}  // namespace
}  // namespace isobath
