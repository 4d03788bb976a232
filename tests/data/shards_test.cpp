#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/data/shards.hpp>

namespace isobath::data {
namespace {

std::vector<Range> sequences_of(const std::vector<Microbatch>& microbatches) {
  std::vector<Range> ranges;
  for (const Microbatch& microbatch : microbatches) ranges.push_back(microbatch.sequences);
  return ranges;
}

TEST(ShardPlan, TheExampleOfTheHeader) {
  const ShardPlan plan(10, 4, 2);
  EXPECT_EQ(plan.sequences_of_shard(0), (Range{0, 3}));
  EXPECT_EQ(plan.sequences_of_shard(3), (Range{8, 10}));
  EXPECT_EQ(sequences_of(plan.microbatches()),
            (std::vector<Range>{{0, 2}, {2, 3}, {3, 5}, {5, 6}, {6, 8}, {8, 10}}));
  EXPECT_EQ(plan.microbatches()[3].shard, 1);
  EXPECT_EQ(plan.microbatches()[3].index, 3);
}

TEST(ShardPlan, HoldersCoverEverySequenceOnceInOrder) {
  for (const int64_t n_sequences : {1, 7, 16, 33}) {
    for (const int64_t n_shards : {1, 4, 16}) {
      for (const int64_t n_parts : {1, 2, 3, 5, 20}) {
        const ShardPlan plan(n_sequences, n_shards, 3);
        int64_t next_sequence = 0, next_microbatch = 0;
        for (int64_t part = 0; part < n_parts; ++part) {
          const Range held = plan.sequences_of(part, n_parts);
          EXPECT_EQ(held.begin, next_sequence);
          for (const Microbatch& microbatch : plan.microbatches_of(part, n_parts)) {
            EXPECT_EQ(microbatch.index, next_microbatch++);
            EXPECT_EQ(microbatch.sequences.begin, next_sequence);
            EXPECT_LE(microbatch.sequences.size(), 3);
            EXPECT_EQ(plan.owners(n_parts)[static_cast<size_t>(microbatch.shard)], part);
            next_sequence = microbatch.sequences.end;
          }
          EXPECT_EQ(held.end, next_sequence);
          std::vector<Microbatch> some, expected;
          for (const Microbatch& microbatch : plan.microbatches())
            if (microbatch.index % 2 == 1) some.push_back(microbatch);
          for (const Microbatch& microbatch : some)
            if (held.contains(microbatch.sequences.begin)) expected.push_back(microbatch);
          const std::vector<Microbatch> found = plan.held_among(some, part, n_parts);
          ASSERT_EQ(found.size(), expected.size());
          for (size_t i = 0; i < found.size(); ++i) EXPECT_EQ(found[i].index, expected[i].index);
        }
        EXPECT_EQ(next_sequence, n_sequences);
        EXPECT_EQ(next_microbatch, static_cast<int64_t>(plan.microbatches().size()));
      }
    }
  }
}

TEST(ShardPlan, MoreShardsThanSequencesAreLowered) {
  const ShardPlan plan(3, 16, 4);
  EXPECT_EQ(plan.n_shards(), 3);
  EXPECT_EQ(plan.n_sequences(), 3);
  EXPECT_EQ(plan.owners(2), (std::vector<int>{0, 0, 1}));
  EXPECT_EQ(plan.sequences_of(4, 5).size(), 0);
}

TEST(ShardPlan, NothingToPlanIsADefect) {
  EXPECT_THROW(ShardPlan(0, 1, 1), InternalError);
  EXPECT_THROW(ShardPlan(1, 0, 1), InternalError);
  EXPECT_THROW(ShardPlan(1, 1, 0), InternalError);
}

}  // namespace
}  // namespace isobath::data
