#include <gtest/gtest.h>

#include <isobath/pipeline/checkpoint_pace.hpp>

namespace isobath::pipeline {
namespace {

TEST(CheckpointPace, ACountIsKeptWhateverTheTime) {
  const CheckpointPace pace(3, 1e12);
  EXPECT_FALSE(pace.is_due(1, 1e9));
  EXPECT_FALSE(pace.is_due(2, 1e9));
  EXPECT_TRUE(pace.is_due(3, 0));
  EXPECT_TRUE(pace.is_due(6, 0));
}

TEST(CheckpointPace, AutoSavesWhenItsShareOfTheTimePaysForIt) {
  CheckpointPace pace(0, 2 * CheckpointPace::kAssumedBytesPerSecond);  // assumed: 2 s
  EXPECT_FALSE(pace.is_due(1, 99));
  EXPECT_TRUE(pace.is_due(1, 101));
  pace.saved(0.5);
  EXPECT_FALSE(pace.is_due(2, 24));
  EXPECT_TRUE(pace.is_due(2, 26));
}

TEST(CheckpointPace, AutoSpendsNoMoreThanItsShare) {
  CheckpointPace pace(0, 0);
  double now = 0, spent = 0, last = 0;
  for (int64_t block = 1; block <= 1000; ++block) {
    now += 1.3;
    if (!pace.is_due(block, now - last)) continue;
    const double cost = 0.2 + 0.1 * static_cast<double>(block % 3);  // a disk with moods
    spent += cost;
    last = now += cost;
    pace.saved(cost);
  }
  EXPECT_GT(spent, 0);
  EXPECT_LT(spent / now, 2 * CheckpointPace::kShare);
}

}  // namespace
}  // namespace isobath::pipeline
