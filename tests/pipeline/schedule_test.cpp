#include <gtest/gtest.h>

#include <isobath/pipeline/schedule.hpp>
#include <isobath/pipeline/validate.hpp>
#include <set>

namespace isobath::pipeline {
namespace {

std::string text_of(const std::vector<Step>& steps) {
  std::string text;
  for (const Step& step : steps)
    text += fmt::format("{}{}{}", text.empty() ? "" : " ", step.kind == Step::Kind::forward ? "F" : "B",
                        step.microbatch);
  return text;
}

TEST(OneForwardOneBackward, FollowsTheTableOfTheHeader) {
  EXPECT_EQ(text_of(one_forward_one_backward(3, 0, 2)), "F0 F1 B0 F2 B1 B2");
  EXPECT_EQ(text_of(one_forward_one_backward(3, 1, 2)), "F0 B0 F1 B1 F2 B2");
}

TEST(OneForwardOneBackward, FewerMicrobatchesThanStagesStillRunsEachOnceBothWays) {
  EXPECT_EQ(text_of(one_forward_one_backward(2, 0, 4)), "F0 F1 B0 B1");
  EXPECT_EQ(text_of(one_forward_one_backward(0, 0, 4)), "");
}

TEST(OneForwardOneBackward, KeepsAtMostAsManyInFlightAsStagesRemain) {
  for (int n_stages = 1; n_stages <= 5; ++n_stages) {
    for (int position = 0; position < n_stages; ++position) {
      std::set<int64_t> in_flight;
      size_t most = 0;
      for (const Step& step : one_forward_one_backward(9, position, n_stages)) {
        if (step.kind == Step::Kind::forward)
          in_flight.insert(step.microbatch);
        else
          EXPECT_EQ(in_flight.erase(step.microbatch), 1u);
        most = std::max(most, in_flight.size());
      }
      EXPECT_TRUE(in_flight.empty());
      EXPECT_EQ(most, static_cast<size_t>(n_stages - position));
    }
  }
}

TEST(ChooseGrid, PrefersReplicasWhenTheModelFitsAndStagesWhenItDoesNot) {
  // Four blocks of time 1 and 10 bytes each.
  const std::vector<StageCost> costs{{4, 40}, {2, 20}, {2, 20}, {1, 10}};

  const GridChoice roomy = choose_grid(4, 16, costs, 100);
  const GridChoice tight = choose_grid(4, 16, costs, 15);
  const GridChoice hopeless = choose_grid(4, 16, costs, 5);

  EXPECT_EQ(roomy.stages, 1);
  EXPECT_EQ(roomy.replicas, 4);
  EXPECT_EQ(tight.stages, 4);
  EXPECT_EQ(hopeless.stages, 0);
}

TEST(ChooseGrid, UsesOnlySplitsOfAllRanks) {
  const std::vector<StageCost> costs{{4, 40}, {2, 20}, {2, 20}};
  const GridChoice choice =
      choose_grid(3, 16, costs, 30);  // one stage of 40 does not fit, two do not divide three ranks
  EXPECT_EQ(choice.stages, 3);
}

// Four blocks of time 1 and 10 bytes each, on four ranks.
const std::vector<StageCost> kCosts{{4, 40}, {2, 20}, {2, 20}, {1, 10}};

TEST(ChooseShape, StreamsWeightsThatNoSplitFits) {
  config::RunConfig config;
  EXPECT_EQ(choose_shape(config, kCosts, 16, 4, 5), (comm::GridShape{1, 4}));
  EXPECT_EQ(config.residency, "streamed");
}

TEST(ChooseShape, KeepsWeightsThatFit) {
  config::RunConfig config;
  EXPECT_EQ(choose_shape(config, kCosts, 16, 4, 15), (comm::GridShape{4, 1}));
  EXPECT_EQ(config.residency, "resident");
  config.residency = "auto";
  EXPECT_EQ(choose_shape(config, kCosts, 16, 4, /*bytes_per_rank=*/0), (comm::GridShape{1, 4}));
  EXPECT_EQ(config.residency, "resident") << "unknown memory";
}

TEST(ChooseShape, StreamsWhereTheConfiguredStagesDoNotFit) {
  config::RunConfig config;
  config.ranks.stages = 2;
  EXPECT_EQ(choose_shape(config, kCosts, 16, 4, 15), (comm::GridShape{2, 2}));
  EXPECT_EQ(config.residency, "streamed");
}

TEST(ChooseShape, DoesAsTheConfigurationSays) {
  config::RunConfig config;
  config.residency = "resident";
  EXPECT_THROW((void)choose_shape(config, kCosts, 16, 4, 5), ConfigError);
  config.ranks.stages = 1;
  EXPECT_EQ(choose_shape(config, kCosts, 16, 4, 5), (comm::GridShape{1, 4}));
  EXPECT_EQ(config.residency, "resident");
  config.residency = "streamed";
  EXPECT_EQ(choose_shape(config, kCosts, 16, 4, 100), (comm::GridShape{1, 4}));
  EXPECT_EQ(config.residency, "streamed");
  config.ranks.stages = 3;
  EXPECT_THROW((void)choose_shape(config, kCosts, 16, 4, 100), ConfigError);
}

TEST(GroupsThatDivide, NamesOnlyGroupsThatFit) {
  EXPECT_EQ(groups_that_divide(576), "16, 32, 64, 96, 192, channel");
  EXPECT_EQ(groups_that_divide(30), "channel");
}

}  // namespace
}  // namespace isobath::pipeline
