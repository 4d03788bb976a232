#include <gtest/gtest.h>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/model/balance.hpp>

namespace isobath::model {
namespace {

/// d_model 2, one head of 2 and d_ff 2: per block q, k, v, o 4 weights each and gate, up, down 4 each, 28 in
/// all.
ModelConfig small_config(int64_t n_blocks, int64_t vocab_size) {
  ModelConfig config;
  config.n_blocks = n_blocks;
  config.vocab_size = vocab_size;
  config.d_model = config.d_ff = config.head_dim = 2;
  config.n_heads = config.n_kv_heads = 1;
  return config;
}

/// Of one token of 4-byte elements: q, k, v, attended, middle, gate and up of 2 channels each, one head's
/// sum.
constexpr double kBlockGib = (14 * 4 + 4) / 0x1p30;

double largest_cost(const ModelConfig& config, int64_t length, const Activations& activations,
                    const std::vector<Range>& stages) {
  const CostModel cost = cost_of(config, length);
  double largest = 0;
  for (size_t stage = 0; stage < stages.size(); ++stage) {
    largest = std::max(largest, stage_cost(config, cost, activations, static_cast<int>(stage),
                                           static_cast<int>(stages.size()), stages[stage].size()));
  }
  return largest;
}

/// The smallest possible maximum, by trying every way to cut.
double best_by_force(const ModelConfig& config, int64_t length, const Activations& activations,
                     std::vector<Range> done, int n_left) {
  const int64_t begin = done.empty() ? 0 : done.back().end;
  if (n_left == 1) {
    done.push_back({begin, config.n_blocks});
    return largest_cost(config, length, activations, done);
  }
  double best = -1;
  for (int64_t end = begin + 1; end <= config.n_blocks - (n_left - 1); ++end) {
    done.push_back({begin, end});
    const double cost = best_by_force(config, length, activations, done, n_left - 1);
    done.pop_back();
    if (best < 0 || cost < best) best = cost;
  }
  return best;
}

TEST(CostModel, CountsByHand) {
  // 2 products of 28 weights; attention 2 channels x 5 positions, three times; head 2 products of 10 x 2.
  const CostModel cost = cost_of(small_config(4, 10), 5);

  EXPECT_EQ(cost.block, 2 * 28 + 3 * 10);
  EXPECT_EQ(cost.recomputation, 28 + 10);
  EXPECT_EQ(cost.embedding, 2);
  EXPECT_EQ(cost.head, 40);
}

TEST(BalanceStages, GivesAHeavyHeadFewerBlocks) {
  // A block costs 92 at length 1, the head 4·44 = 176, about two blocks: 6 blocks + 2 over two stages is 4
  // and 2 + head.
  const std::vector<Range> expected = {{0, 4}, {4, 6}};

  EXPECT_EQ(balance_stages(small_config(6, 44), 1, 2), expected);
}

TEST(BalanceStages, SplitsEvenlyWhenBlocksDominate) {
  const std::vector<Range> expected = {{0, 2}, {2, 4}, {4, 6}};

  EXPECT_EQ(balance_stages(small_config(6, 1), 1, 3), expected);
}

TEST(BalanceStages, GivesFewerBlocksToTheFirstStageWhichRecomputesMore) {
  // Eight microbatches of a block fit: four blocks of the first of two stages, which has two in flight, eight
  // of the last. Of 7 and 7 blocks the stages cost 7·62 + 3·30 and 7·62, of 6 and 8 blocks 6·62 + 2·30 and
  // 8·62.
  const ModelConfig config = small_config(14, 1);
  const std::vector<Range> expected = {{0, 7}, {7, 14}}, uneven = {{0, 6}, {6, 14}};
  EXPECT_EQ(balance_stages(config, 1, 2), expected);
  EXPECT_EQ(balance_stages(config, 1, 2, {.limit_gib = 8.5 * kBlockGib}), uneven);
}

TEST(BalanceStages, OneStageTakesAll) {
  EXPECT_EQ(balance_stages(small_config(6, 44), 1, 1), (std::vector<Range>{{0, 6}}));
}

TEST(BalanceStages, EveryStageKeepsABlockUnderAHugeHead) {
  const std::vector<Range> expected = {{0, 1}, {1, 2}, {2, 3}};

  EXPECT_EQ(balance_stages(small_config(3, 100000), 1, 3), expected);
}

TEST(BalanceStages, ReachesTheMinimumFoundByForce) {
  for (const int64_t vocab_size : {1, 30, 60, 150, 400}) {
    for (int64_t n_blocks = 1; n_blocks <= 8; ++n_blocks) {
      for (int n_stages = 1; n_stages <= n_blocks; ++n_stages) {
        const ModelConfig config = small_config(n_blocks, vocab_size);
        // Of no, and of four microbatches' activations of a block.
        for (const double n_kept : {0, 4}) {
          const Activations activations{.limit_gib = n_kept * kBlockGib};
          const std::vector<Range> stages = balance_stages(config, 3, n_stages, activations);
          EXPECT_EQ(static_cast<int>(stages.size()), n_stages);
          EXPECT_EQ(stages.front().begin, 0);
          EXPECT_EQ(stages.back().end, n_blocks);
          for (size_t s = 1; s < stages.size(); ++s) EXPECT_EQ(stages[s].begin, stages[s - 1].end);
          for (const Range& stage : stages) EXPECT_GE(stage.size(), 1);
          EXPECT_EQ(largest_cost(config, 3, activations, stages),
                    best_by_force(config, 3, activations, {}, n_stages))
              << n_blocks << " blocks, " << n_stages << " stages, vocabulary " << vocab_size;
        }
      }
    }
  }
}

TEST(BalanceStages, SaysBothNumbersWhenThereAreTooManyStages) {
  try {
    (void)balance_stages(small_config(3, 10), 1, 5);
    FAIL() << "five stages of three blocks were accepted";
  } catch (const ConfigError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find('5'), std::string::npos) << message;
    EXPECT_NE(message.find('3'), std::string::npos) << message;
  }
}

TEST(ShardsPerSegment, AreAboutThirtyTwoMicrobatchesAStageAndEightWithOne) {
  EXPECT_EQ(shards_per_segment(512, 64, 4), 16);  // 128 microbatches in shards of 8
  EXPECT_EQ(shards_per_segment(64, 16, 2), 16);
  EXPECT_EQ(shards_per_segment(128, 16, 1), 1);
  EXPECT_EQ(shards_per_segment(128, 2, 1), 1);  // never less than a whole shard
  EXPECT_EQ(shards_per_segment(3, 4, 1), 8);
}

TEST(CountKeptBlocks, FillTheLimit) {
  const Activations activations{.n_tokens = 3, .limit_gib = 3 * 2.5 * kBlockGib};
  EXPECT_EQ(count_kept_blocks(small_config(4, 10), activations, 1), 2);
  EXPECT_EQ(count_kept_blocks(small_config(4, 10), activations, 2), 1);
  EXPECT_EQ(count_kept_blocks(small_config(4, 10), {}, 1), 0);
}

}  // namespace
}  // namespace isobath::model
