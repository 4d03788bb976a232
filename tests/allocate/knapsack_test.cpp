#include <gtest/gtest.h>

#include <isobath/core/error.hpp>

#include "allocate/problems.hpp"

namespace isobath::allocate {
namespace {

// The search ends at this relative gap.
constexpr double kGap = 1e-6;

std::vector<double> losses(const Candidates& candidates, int64_t seed) {
  const at::Tensor scores = testing::small_scores(candidates, 1, seed).square().contiguous();
  const auto* values = scores.const_data_ptr<double>();
  return {values, values + scores.numel()};
}

TEST(Knapsack, FindsWhatTryingEverySelectionFinds) {
  for (int64_t seed = 0; seed < 20; ++seed) {
    const Candidates candidates = testing::small_candidates(8, 0.05 * static_cast<double>(seed));
    const std::vector<double> loss = losses(candidates, seed);

    const Selection found = solve_knapsack(candidates, loss);

    EXPECT_LE(cost_of(candidates, found), candidates.budget);
    const double least = sum_of(brute_force_knapsack(candidates, loss), loss);
    EXPECT_LE(sum_of(found, loss), least * (1 + kGap)) << seed;
  }
}

TEST(Knapsack, TheCheapestSelectionIsAllThatASmallBudgetLeaves) {
  const Candidates candidates = testing::small_candidates(5, 0);
  const std::vector<double> loss = losses(candidates, 3);

  EXPECT_EQ(solve_knapsack(candidates, loss), cheapest(candidates));
}

TEST(Knapsack, ABudgetBelowTheCheapestSelectionIsRefused) {
  Candidates candidates = testing::small_candidates(5, 0);
  candidates.budget -= 1;
  EXPECT_THROW((void)KnapsackRelaxation(candidates), InternalError);
}

TEST(Knapsack, TheLinearProgramIsABoundAndTakesOneShareASet) {
  const Candidates candidates = testing::small_candidates(8, 0.4);
  KnapsackRelaxation program(candidates);
  for (int64_t seed = 0; seed < 5; ++seed) {
    const std::vector<double> loss = losses(candidates, seed);

    const std::vector<double> shares = program.minimise(loss);

    double value = 0, cost = 0;
    for (size_t k = 0; k < loss.size(); ++k) {
      value += shares[k] * loss[k];
      cost += shares[k] * static_cast<double>(candidates.cost[k]);
    }
    EXPECT_LE(value, sum_of(brute_force_knapsack(candidates, loss), loss) * (1 + kGap));
    EXPECT_LE(cost, static_cast<double>(candidates.budget) * (1 + kGap));
    for (size_t set = 0; set + 1 < candidates.first.size(); ++set) {
      double sum = 0;
      for (int64_t k = candidates.first[set]; k < candidates.first[set + 1]; ++k)
        sum += shares[static_cast<size_t>(k)];
      EXPECT_NEAR(sum, 1, kGap);
    }
  }
}

TEST(Knapsack, ManyEqualSetsAreSolvedTwiceAlike) {
  Candidates candidates;
  candidates.first.push_back(0);
  for (int64_t set = 0; set < 200; ++set) {
    for (const int64_t bits : {2, 3, 4}) candidates.cost.push_back(4096 * bits);
    candidates.first.push_back(candidates.size());
  }
  candidates.budget = int64_t{4096} * 200 * 3 - 1;
  const std::vector<double> loss = losses(candidates, 1);

  const Selection first = solve_knapsack(candidates, loss), second = solve_knapsack(candidates, loss);

  EXPECT_EQ(first, second);
  EXPECT_LE(cost_of(candidates, first), candidates.budget);
}

}  // namespace
}  // namespace isobath::allocate
