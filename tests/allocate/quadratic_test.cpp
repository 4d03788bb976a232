#include <gtest/gtest.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>

#include "allocate/problems.hpp"

namespace isobath::allocate {
namespace {

// f64 sums of a hundred terms.
constexpr double kRounding = 1e-10;

QuadraticLoss small_loss(const Candidates& candidates, int64_t n_draws, int64_t seed, bool with_linear) {
  return estimate_loss(testing::small_scores(candidates, n_draws, seed), candidates, 10.0, with_linear);
}

TEST(QuadraticLoss, IsHalfTheMeanSquareOfTheSummedScoresWhereNothingIsShrunk) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const at::Tensor scores = testing::small_scores(candidates, 7, 1);
  QuadraticLoss loss = estimate_loss(scores, candidates, 10.0, false);
  loss.curvature = scores.t().mm(scores) / 70.0;
  const Selection selection{0, 4, 8, 9};
  at::Tensor sum = at::zeros({7}, at::kDouble);
  for (const int64_t k : selection) sum += scores.select(1, k);

  EXPECT_NEAR(loss(selection), 0.5 * sum.square().mean().item<double>() / 10, kRounding);
}

TEST(QuadraticLoss, ShrinksNoiseAwayAndKeepsWhatManyDrawsAgreeOn) {
  const Candidates candidates = testing::small_candidates(6, 0.5);
  const QuadraticLoss few = small_loss(candidates, 4, 2, false),
                      many = small_loss(candidates, 4000, 2, false);
  EXPECT_GT(few.shrinkage, many.shrinkage);
  EXPECT_LT(many.shrinkage, 0.05);
  EXPECT_EQ(small_loss(candidates, 1, 2, false).shrinkage, 1);

  // Independent scores have no correlation to keep.
  const at::Tensor independent = at::randn({6, candidates.size()}, at::kDouble);
  EXPECT_GT(estimate_loss(independent, candidates, 10.0, false).shrinkage, 0.5);
}

TEST(QuadraticLoss, TheDiagonalIsNotShrunkAndTheMatrixIsPositiveSemidefinite) {
  const Candidates candidates = testing::small_candidates(6, 0.5);
  const at::Tensor scores = testing::small_scores(candidates, 5, 3);

  const QuadraticLoss loss = estimate_loss(scores, candidates, 10.0, false);

  EXPECT_TRUE(at::allclose(loss.curvature.diagonal(), scores.square().mean(0) / 10));
  EXPECT_GT(at::linalg_eigvalsh(loss.curvature).min().item<double>(), -kRounding);
}

TEST(QuadraticLoss, FirstOrderTermsWithinTheirErrorVanish) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const at::Tensor noise = testing::small_scores(candidates, 64, 4);
  const at::Tensor centred = noise - noise.mean(0);
  EXPECT_EQ(estimate_loss(centred, candidates, 10.0, true).linear.abs().max().item<double>(), 0);

  const QuadraticLoss shifted = estimate_loss(centred + 5.0, candidates, 10.0, true);
  EXPECT_GT(shifted.linear.min().item<double>(), 0.4);
  EXPECT_LE(shifted.linear.max().item<double>(), 0.5 + kRounding);
}

TEST(HeldOut, IsTheMeanOverFoldsOfWhatTheOtherFoldsChoose) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const at::Tensor scores = testing::small_scores(candidates, 8, 6);
  const Selection fixed{0, 4, 8, 9};

  const double found = held_out_loss(scores, candidates, 10.0, true, 1, 0.5, [&](const QuadraticLoss& loss) {
    EXPECT_EQ(loss.shrinkage, 0.5);
    return fixed;
  });

  EXPECT_NEAR(found, sample_loss(scores, fixed, 10.0, true), kRounding);
  EXPECT_THROW((void)held_out_loss(scores.slice(0, 0, 3), candidates, 10.0, true, 1, 0.5,
                                   [&](const QuadraticLoss&) { return fixed; }),
               InternalError);
}

TEST(HeldOut, DrawsOfASequenceStayTogether) {
  // Both draws of a sequence are alike: held out apart, a choice would be judged on what it was made from.
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const at::Tensor once = testing::small_scores(candidates, 8, 7), twice = once.repeat_interleave(2, 0);
  const auto choose = [&](const QuadraticLoss& loss) { return brute_force_minimum(loss, candidates); };

  EXPECT_NEAR(held_out_loss(twice, candidates, 10.0, false, 2, 0.3, choose),
              held_out_loss(once, candidates, 10.0, false, 1, 0.3, choose), kRounding);
}

TEST(HeldOut, ChoosesAShrinkageNoWorseThanTheAnalyticOne) {
  for (int64_t seed = 0; seed < 5; ++seed) {
    const Candidates candidates = testing::small_candidates(10, 0.4);
    const at::Tensor scores = testing::small_scores(candidates, 12, seed);
    const auto held_out = [&](double shrinkage) {
      return held_out_loss(scores, candidates, 10.0, false, 1, shrinkage, [&](const QuadraticLoss& loss) {
        return exchange(loss, candidates, solve_knapsack(candidates, loss.diagonal()));
      });
    };
    const double analytic = estimate_loss(scores, candidates, 10.0, false).shrinkage;

    const double found = validated_shrinkage(scores, candidates, 10.0, false, 1);

    EXPECT_GE(found, analytic);
    EXPECT_LE(found, 1);
    EXPECT_LE(held_out(found), held_out(analytic));
  }
}

TEST(Exchange, FindsTheBestOfAllSelectionsOfSmallProblems) {
  for (int64_t seed = 0; seed < 20; ++seed) {
    const Candidates candidates = testing::small_candidates(8, 0.05 * static_cast<double>(seed));
    const QuadraticLoss loss = small_loss(candidates, 12, seed, seed % 2 == 0);
    const double least = loss(brute_force_minimum(loss, candidates));
    const Relaxation relaxation = relax(loss, candidates);

    const Selection found = minimise(loss, candidates, relaxation, {});

    EXPECT_LE(cost_of(candidates, found), candidates.budget);
    EXPECT_NEAR(loss(found), least, kRounding) << seed;
    EXPECT_LE(relaxation.bound, least + kRounding) << seed;
    EXPECT_GE(relaxation.bound, least - 0.5 * std::abs(least)) << "a bound that says nothing, seed " << seed;
  }
}

TEST(Exchange, NeverMakesAStartWorse) {
  const Candidates candidates = testing::small_candidates(30, 0.5);
  const QuadraticLoss loss = small_loss(candidates, 16, 5, true);
  const Selection start = solve_knapsack(candidates, loss.diagonal());

  const Selection found = exchange(loss, candidates, start);

  EXPECT_LE(loss(found), loss(start));
  EXPECT_LE(cost_of(candidates, found), candidates.budget);
  EXPECT_EQ(found, exchange(loss, candidates, start));
}

TEST(Exchange, SeesThatPerturbationsCancel) {
  // Two sets whose scores at 2 bits are opposite: together they cost nothing, which no additive score can
  // see.
  const Candidates candidates{.first = {0, 2, 4, 6}, .cost = {2, 4, 2, 4, 2, 4}, .budget = 8};
  const at::Tensor direction = at::tensor({1.0, -1.0, 1.0, -1.0, 1.0, 1.0}, at::kDouble);
  const at::Tensor other = at::tensor({0.9, 0.9, -0.9, -0.9, 0.9, -0.9}, at::kDouble);
  const at::Tensor none = at::zeros({6}, at::kDouble);
  const at::Tensor scores = at::stack({direction, none, -direction, none, other, none}, 1);
  QuadraticLoss loss = estimate_loss(scores, candidates, 1.0, false);
  loss.curvature = scores.t().mm(scores) / 6;  // as many draws would have it

  const Selection quadratic = minimise(loss, candidates, relax(loss, candidates), {});

  EXPECT_EQ(quadratic, (Selection{0, 2, 5}));
  EXPECT_NEAR(loss(quadratic), 0, kRounding);
  EXPECT_GT(loss(solve_knapsack(candidates, loss.diagonal())), 0.1);
}

}  // namespace
}  // namespace isobath::allocate
