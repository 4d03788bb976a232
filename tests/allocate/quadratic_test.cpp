#include <gtest/gtest.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>

#include "allocate/problems.hpp"

namespace isobath::allocate {
namespace {

// f64 sums of a hundred terms.
constexpr double kRounding = 1e-10;

Scores scores_of(at::Tensor values, bool with_linear = false) {
  return {.values = std::move(values), .tokens_per_sequence = 10, .with_linear = with_linear};
}

QuadraticLoss small_loss(const Candidates& candidates, int64_t n_draws, int64_t seed, bool with_linear) {
  return estimate_loss(scores_of(testing::small_scores(candidates, n_draws, seed), with_linear), candidates);
}

TEST(QuadraticLoss, IsHalfTheMeanSquareOfTheSummedScoresWhereNothingIsShrunk) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const at::Tensor scores = testing::small_scores(candidates, 7, 1);
  QuadraticLoss loss = estimate_loss(scores_of(scores), candidates);
  loss.curvature = scores.t().mm(scores) / 70.0;
  const Selection selection{0, 4, 8, 9};
  at::Tensor sum = at::zeros({7}, at::kDouble);
  for (const int64_t k : selection) sum += scores.select(1, k);

  EXPECT_NEAR(loss(selection), 0.5 * sum.square().mean().item<double>() / 10, kRounding);
}

/// Scores of sets of which neighbours in pairs of `of_pair` share half of their variance, with the signs
/// given in turn; nothing else goes together.
at::Tensor paired_scores(const Candidates& candidates, int64_t n_draws, const std::vector<double>& signs) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{9});
  const auto draw = [&](at::IntArrayRef shape) {
    return at::randn(shape, std::optional<at::Generator>(generator), at::kDouble);
  };
  at::Tensor scores = draw({n_draws, candidates.size()});
  for (int64_t pair = 0; pair < candidates.n_sets() / 2; ++pair) {
    const auto first = candidates.first[static_cast<size_t>(2 * pair)],
               middle = candidates.first[static_cast<size_t>(2 * pair + 1)],
               last = candidates.first[static_cast<size_t>(2 * pair + 2)];
    const at::Tensor shared = draw({n_draws, 1});
    scores.slice(1, first, middle).add_(shared);
    scores.slice(1, middle, last).add_(shared, signs[static_cast<size_t>(pair) % signs.size()]);
  }
  return scores;
}

double correlation(const QuadraticLoss& loss, int64_t i, int64_t j) {
  const auto c = loss.curvature.accessor<double, 2>();
  return c[i][j] / std::sqrt(c[i][i] * c[j][j]);
}

TEST(QuadraticLoss, ShrinksNoiseAwayAndKeepsWhatManyDrawsAgreeOn) {
  const Candidates candidates = testing::small_candidates(6, 0.5);
  const auto shrinkage_of = [&](int64_t n_draws) {
    return estimate_loss(scores_of(paired_scores(candidates, n_draws, {1, -1})), candidates)
        .coupling.shrinkage;
  };
  EXPECT_GT(shrinkage_of(6), shrinkage_of(4000));
  EXPECT_LT(shrinkage_of(4000), 0.05);
  EXPECT_EQ(shrinkage_of(1), 1);

  // Independent scores have no correlation to keep.
  const at::Tensor independent = at::randn({6, candidates.size()}, at::kDouble);
  EXPECT_GT(estimate_loss(scores_of(independent), candidates).coupling.shrinkage, 0.5);
}

TEST(QuadraticLoss, KeepsTheMeanCorrelationThatAllPairsShareWhateverItShrinks) {
  // 0.7² of 0.7² + 1 + 0.2² + 0.3²: all pairs go together alike (testing::small_scores).
  constexpr double kCommon = 0.36;
  const Candidates candidates = testing::small_candidates(12, 0.5);

  const QuadraticLoss loss = small_loss(candidates, 400, 2, false);

  EXPECT_GT(loss.coupling.shrinkage, 0.5);
  for (const int64_t other : {3, 9, 27})
    EXPECT_NEAR(correlation(loss, 0, other), kCommon, 0.1);  // standard error of the mean of 400 draws: 0.04
  const Scores all = scores_of(testing::small_scores(candidates, 400, 2));
  const Selection selection = cheapest(candidates);
  EXPECT_NEAR(loss(selection) / sample_loss(all, selection), 1, 0.03);
}

TEST(QuadraticLoss, TheDiagonalIsNotShrunkAndTheMatrixIsPositiveSemidefinite) {
  const Candidates candidates = testing::small_candidates(6, 0.5);
  const at::Tensor scores = testing::small_scores(candidates, 5, 3);

  const QuadraticLoss loss = estimate_loss(scores_of(scores), candidates);

  EXPECT_TRUE(at::allclose(loss.curvature.diagonal(), scores.square().mean(0) / 10));
  EXPECT_GT(at::linalg_eigvalsh(loss.curvature).min().item<double>(), -kRounding);
}

TEST(QuadraticLoss, DrawsOfASequenceAreNotTakenForIndependent) {
  const Candidates candidates = testing::small_candidates(6, 0.5);
  const Scores once = scores_of(testing::small_scores(candidates, 12, 8));
  Scores repeated = once.with_values(once.values.repeat_interleave(8, 0));
  EXPECT_LT(estimate_loss(repeated, candidates).coupling.shrinkage,
            estimate_loss(once, candidates).coupling.shrinkage);

  repeated.samples = 8;

  EXPECT_NEAR(estimate_loss(repeated, candidates).coupling.shrinkage,
              estimate_loss(once, candidates).coupling.shrinkage, kRounding);
}

TEST(QuadraticLoss, KeepsLessOfPairsThatAreFurtherApartWhereOnlyNeighboursAgree) {
  // Two sets a block that go together or against each other, nothing between blocks.
  constexpr int64_t kBlocks = 8, kDraws = 60;
  const Candidates candidates = testing::small_candidates(2 * kBlocks, 0.5);
  Scores scores = scores_of(paired_scores(candidates, kDraws, {1, -1}));
  for (int64_t block = 0; block < kBlocks; ++block) scores.block.insert(scores.block.end(), 2, block);

  const QuadraticLoss loss = estimate_loss(scores, candidates);

  EXPECT_LT(loss.coupling.shrinkage, 0.2);
  EXPECT_LT(loss.coupling.decay, 0.3);
  // Standard error of a correlation of 60 draws: 0.1.
  EXPECT_NEAR(correlation(loss, 0, candidates.first[1]), 0.5, 0.2);
  EXPECT_NEAR(correlation(loss, candidates.first[2], candidates.first[3]), -0.5, 0.2);
  EXPECT_NEAR(correlation(loss, 0, candidates.first[4]), 0, 0.03);
  EXPECT_GT(at::linalg_eigvalsh(loss.curvature).min().item<double>(), -kRounding);
  const double bound = relax(loss, candidates).bound;
  EXPECT_LE(bound, loss(minimise(loss, candidates, relax(loss, candidates), {})) + kRounding);

  // Without places all pairs count alike, and most of them are noise.
  scores.block.clear();
  EXPECT_GT(estimate_loss(scores, candidates).coupling.shrinkage, 0.3);
}

TEST(QuadraticLoss, FirstOrderTermsWithinTheirErrorVanish) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const at::Tensor noise = testing::small_scores(candidates, 64, 4);
  const at::Tensor centred = noise - noise.mean(0);
  EXPECT_EQ(estimate_loss(scores_of(centred, true), candidates).linear.abs().max().item<double>(), 0);

  const QuadraticLoss shifted = estimate_loss(scores_of(centred + 5.0, true), candidates);
  EXPECT_GT(shifted.linear.min().item<double>(), 0.4);
  EXPECT_LE(shifted.linear.max().item<double>(), 0.5 + kRounding);
}

TEST(HeldOut, IsTheMeanOverFoldsOfWhatTheOtherFoldsChoose) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const Scores scores = scores_of(testing::small_scores(candidates, 8, 6), true);
  const Selection fixed{0, 4, 8, 9};

  const double found = held_out_loss(scores, candidates, 0.5, [&](const QuadraticLoss& loss) {
    EXPECT_EQ(loss.coupling.shrinkage, 0.5);
    return fixed;
  });

  EXPECT_NEAR(found, sample_loss(scores, fixed), kRounding);
  EXPECT_THROW((void)held_out_loss(scores.with_values(scores.values.slice(0, 0, 3)), candidates, 0.5,
                                   [&](const QuadraticLoss&) { return fixed; }),
               InternalError);
}

TEST(HeldOut, DrawsOfASequenceStayTogether) {
  // Both draws of a sequence are alike: held out apart, a choice would be judged on what it was made from.
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const Scores once = scores_of(testing::small_scores(candidates, 8, 7));
  Scores twice = once.with_values(once.values.repeat_interleave(2, 0));
  twice.samples = 2;
  const auto choose = [&](const QuadraticLoss& loss) { return brute_force_minimum(loss, candidates); };

  EXPECT_NEAR(held_out_loss(twice, candidates, 0.3, choose), held_out_loss(once, candidates, 0.3, choose),
              kRounding);
}

TEST(HeldOut, ChoosesAShrinkageNoWorseThanTheAnalyticOne) {
  for (int64_t seed = 0; seed < 5; ++seed) {
    const Candidates candidates = testing::small_candidates(10, 0.4);
    const Scores scores = scores_of(testing::small_scores(candidates, 12, seed));
    const auto held_out = [&](double shrinkage) {
      return held_out_loss(scores, candidates, shrinkage, [&](const QuadraticLoss& loss) {
        return exchange(loss, candidates, solve_knapsack(candidates, loss.diagonal()));
      });
    };
    const double analytic = estimate_loss(scores, candidates).coupling.shrinkage;

    const double found = validated_shrinkage(scores, candidates);

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
  QuadraticLoss loss = estimate_loss({.values = scores}, candidates);
  loss.curvature = scores.t().mm(scores) / 6;  // as many draws would have it

  const Selection quadratic = minimise(loss, candidates, relax(loss, candidates), {});

  EXPECT_EQ(quadratic, (Selection{0, 2, 5}));
  EXPECT_NEAR(loss(quadratic), 0, kRounding);
  EXPECT_GT(loss(solve_knapsack(candidates, loss.diagonal())), 0.1);
}

}  // namespace
}  // namespace isobath::allocate
