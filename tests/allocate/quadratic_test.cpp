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
  // The loss of a selection on the draws as they are.
  const Selection selection = cheapest(candidates);
  const at::Tensor sums =
      testing::small_scores(candidates, 400, 2).index_select(1, at::tensor(selection, at::kLong)).sum(1);
  EXPECT_NEAR(loss(selection) / (0.5 * sums.square().mean().item<double>() / 10), 1, 0.03);
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
  Scores repeated = scores_of(once.values.repeat_interleave(8, 0));
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

/// Sets of two kinds in each block with widths 2 and 4 each: at 2 bits they share half of their variance, at
/// 4 nothing. The last block lacks the second kind.
struct TwoKinds {
  Candidates candidates;
  Scores scores;
};

TwoKinds two_kinds(int64_t n_blocks, int64_t n_draws) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{11});
  const auto draw = [&] {
    return at::randn({n_draws}, std::optional<at::Generator>(generator), at::kDouble);
  };
  TwoKinds result;
  std::vector<at::Tensor> columns;
  result.candidates.first.push_back(0);
  for (int64_t block = 0; block < n_blocks; ++block) {
    const at::Tensor shared = draw();
    for (int64_t kind = 0; kind < (block + 1 < n_blocks ? 2 : 1); ++kind) {
      result.scores.block.push_back(block);
      result.scores.kind.push_back(kind);
      for (const int64_t bits : {2, 4}) {
        result.candidates.cost.push_back(100 * bits);
        result.scores.bits.push_back(bits);
        columns.push_back(bits == 2 ? shared + draw() : 0.3 * draw());
      }
      result.candidates.first.push_back(result.candidates.size());
    }
  }
  result.candidates.budget = 300 * result.candidates.n_sets();
  result.scores.values = at::stack(columns, 1);
  return result;
}

TEST(QuadraticLoss, PoolsTheCorrelationsOfTheSameKindsAndWidthsOverBlocks) {
  // Eight draws say little of one pair, of the mean of 39 blocks they do.
  constexpr int64_t kBlocks = 40, kDraws = 8;
  const auto [candidates, scores] = two_kinds(kBlocks, kDraws);

  const QuadraticLoss loss = estimate_loss(scores, candidates);

  EXPECT_GT(loss.coupling.shrinkage, 0.7);
  double at_two = 0, at_four = 0, between = 0;
  for (int64_t block = 0; block + 1 < kBlocks; ++block) {
    at_two += correlation(loss, 4 * block, 4 * block + 2) / (kBlocks - 1);
    at_four += correlation(loss, 4 * block + 1, 4 * block + 3) / (kBlocks - 1);
    between += correlation(loss, 4 * block, 4 * block + 4) / (kBlocks - 1);
    EXPECT_NEAR(correlation(loss, 4 * block, 4 * block + 2), 0.5, 0.3) << "block " << block;
  }
  // Standard error of the mean of 39 correlations of 8 draws: 0.06.
  EXPECT_NEAR(at_two, 0.5, 0.15);
  EXPECT_NEAR(at_four, 0, 0.15);
  EXPECT_NEAR(between, 0, 0.15);
}

TEST(QuadraticLoss, WithKindsTheMatrixIsPositiveSemidefiniteAndTheBoundHolds) {
  for (const int64_t n_blocks : {2, 4}) {
    const auto [candidates, scores] = two_kinds(n_blocks, 50);

    const QuadraticLoss loss = estimate_loss(scores, candidates);
    const Relaxation relaxation = relax(loss, candidates);

    EXPECT_GT(loss.coupling.alone, 0);
    EXPECT_LT(loss.coupling.alone, 1);
    EXPECT_GT(at::linalg_eigvalsh(loss.curvature).min().item<double>(), -kRounding);
    const double least = loss(brute_force_minimum(loss, candidates));
    EXPECT_NEAR(loss(minimise(loss, candidates, relaxation, {})), least, kRounding);
    EXPECT_LE(relaxation.bound, least + kRounding);
    EXPECT_GE(relaxation.bound, 0.5 * least);
  }
}

TEST(QuadraticLoss, RefusesTwoSetsOfOneKindInABlock) {
  auto [candidates, scores] = two_kinds(3, 8);
  scores.kind[1] = scores.kind[0];
  EXPECT_THROW((void)estimate_loss(scores, candidates), InternalError);
}

TEST(QuadraticLoss, SquaresAreShrunkTowardsThePriorByHand) {
  // Squares 4, 8 and 1, 3: means 6 and 2, squared standard errors 4 and 1. Priors 1 and 4 have the ratios 6
  // and 1/2, whose geometric mean is sqrt(3): expected sqrt(3) and 4 sqrt(3).
  const Candidates candidates{.first = {0, 1, 2}, .cost = {2, 2}, .budget = 4};
  Scores scores = scores_of(at::tensor({4.0, 1.0, 8.0, 3.0}, at::kDouble).reshape({2, 2}).sqrt());
  scores.bits = {2, 2};
  scores.prior = at::tensor({0.5, 3.0, 1.5, 5.0}, at::kDouble).reshape({2, 2});
  const double root = std::sqrt(3.0);
  const double noise = 4 / 3.0 + 1 / 48.0,
               deviation = std::pow(6 / root - 1, 2) + std::pow(2 / (4 * root) - 1, 2);
  const double share = noise / deviation;

  const QuadraticLoss loss = estimate_loss(scores, candidates);

  EXPECT_NEAR(loss.prior_share.at(2), share, kRounding);
  EXPECT_NEAR(loss.curvature[0][0].item<double>(), (6 + share * (root - 6)) / 10, kRounding);
  EXPECT_NEAR(loss.curvature[1][1].item<double>(), (2 + share * (4 * root - 2)) / 10, kRounding);
  const QuadraticLoss as_found = estimate_loss(scores.without_prior(), candidates);
  EXPECT_NEAR(as_found.curvature[0][0].item<double>(), 6 / 10.0, kRounding);
  EXPECT_TRUE(as_found.prior_share.empty());
}

TEST(QuadraticLoss, ThePriorCountsAsMuchAsScoresAreNoisyAndItIsRight) {
  // True squares 1, 2, …, 40; the prior is half of them, or says nothing.
  constexpr int64_t kSets = 40;
  Candidates candidates{.first = {0}, .cost = std::vector<int64_t>(kSets, 1), .budget = kSets};
  for (int64_t set = 0; set < kSets; ++set) candidates.first.push_back(set + 1);
  auto generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{12});
  const at::Tensor truth = at::arange(1, kSets + 1, at::kDouble);
  const auto share = [&](int64_t n_draws, const at::Tensor& prior) {
    Scores scores = scores_of(
        at::randn({n_draws, kSets}, std::optional<at::Generator>(generator), at::kDouble) * truth.sqrt());
    scores.bits.assign(kSets, 3);
    scores.prior = prior.expand({n_draws, kSets});
    return estimate_loss(scores, candidates).prior_share.at(3);
  };
  EXPECT_GT(share(50, truth / 2), 0.6);
  EXPECT_LT(share(50, truth.flip(0)), 0.1);
  EXPECT_LT(share(5000, truth.sqrt()), 0.05);
}

TEST(HeldOut, IsTheMeanOverFoldsOfWhatTheOtherFoldsChooseJudgedWithoutThePrior) {
  const Candidates candidates = testing::small_candidates(4, 0.5);
  Scores scores = scores_of(testing::small_scores(candidates, 8, 6), true);
  scores.bits.assign(static_cast<size_t>(candidates.size()), 3);
  scores.prior = at::ones_like(scores.values);
  const Selection fixed{0, 4, 8, 9};
  double expected = 0;
  for (const int64_t held : {0, 1, 2, 3}) {
    Scores fold = scores_of(scores.values.index_select(0, at::tensor({held, held + 4}, at::kLong)), true);
    expected += estimate_loss(fold, candidates)(fixed) / 4;
  }

  const double found = held_out_loss(scores, candidates, [&](const QuadraticLoss& loss) {
    EXPECT_EQ(loss.prior_share.count(3), 1);
    return fixed;
  });

  EXPECT_NEAR(found, expected, kRounding);
  EXPECT_THROW((void)held_out_loss(scores.of_sequences(at::arange(3, at::kLong)), candidates,
                                   [&](const QuadraticLoss&) { return fixed; }),
               InternalError);
}

TEST(HeldOut, DrawsOfASequenceStayTogether) {
  // Both draws of a sequence are alike: held out apart, a choice would be judged on what it was made from.
  const Candidates candidates = testing::small_candidates(4, 0.5);
  const Scores once = scores_of(testing::small_scores(candidates, 8, 7));
  Scores twice = scores_of(once.values.repeat_interleave(2, 0));
  twice.samples = 2;
  const auto choose = [&](const QuadraticLoss& loss) { return brute_force_minimum(loss, candidates); };

  EXPECT_NEAR(held_out_loss(twice, candidates, choose), held_out_loss(once, candidates, choose), kRounding);
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
