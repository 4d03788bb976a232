#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/reference.hpp>
#include <isobath/quant/refine.hpp>
#include <isobath/quant/solver.hpp>
#include <limits>

#include "quant/problem.hpp"

namespace isobath::quant {

/// Moves are judged in f32, the objective is taken in f64.
constexpr double kRoundingSlack = 1 + 1e-6;
/// A move at a tie may be taken in f32 and not in f64; the whole row then takes another path.
constexpr double kMinRowsEqual = 0.9;
constexpr double kTotalObjectiveTolerance = 5e-3;
/// Errors are carried through two sweeps in f32, and λ‖ΔW‖² is subtracted.
constexpr double kObjectiveTolerance = 1e-4;
constexpr double kDamping = 0.01;

static double reached(const Problem& problem, const at::Tensor& h, const QuantizedMatrix& matrix) {
  return objective(problem.w, dequantize(matrix), h);
}

/// (H + λ·mean(diag H)·I)/mean over the live columns, f64; dead ones are zero.
static at::Tensor damped(const at::Tensor& h, double damping = kDamping) {
  const at::Tensor wide = h.to(at::kDouble), diagonal = wide.diagonal();
  const at::Tensor is_live = (diagonal > 0).to(at::kDouble);
  return wide / (diagonal.sum() / is_live.sum()) + damping * at::diag(is_live);
}

TEST(RefinementSlabs, EndWhereGroupsEndOrAreSinglePanels) {
  const auto of = [](int64_t n_columns, int64_t panel, int64_t group) {
    std::vector<std::pair<int64_t, int64_t>> slabs;
    for (const Range& slab : refinement_slabs(column_panels(n_columns, panel), group))
      slabs.emplace_back(slab.begin, slab.end);
    return slabs;
  };
  using Slabs = std::vector<std::pair<int64_t, int64_t>>;
  EXPECT_EQ(of(576, 384, 64), (Slabs{{0, 384}, {384, 576}}));
  EXPECT_EQ(of(1024, 384, 256), (Slabs{{0, 768}, {768, 1024}}));
  EXPECT_EQ(of(1024, 384, 1024), (Slabs{{0, 1024}}));
  EXPECT_EQ(of(kWidestSlab + 384, 384, kWidestSlab + 384).size(), 9U) << "too wide: one panel a slab";
}

TEST(Slab, IsTheDampedHessianOfItsColumns) {
  Problem problem = random_problem(1, 96, 27);
  problem.h[40].zero_();
  problem.h.select(1, 40).zero_();
  for (const auto order : {ActOrder::none, ActOrder::static_groups}) {
    const Factor factor = factorize(problem.h, {.damping = 0.05, .act_order = order, .panel_width = 32});
    const at::Tensor expected =
        damped(problem.h, 0.05).index_select(0, factor.order).index_select(1, factor.order).to(at::kFloat);
    for (const Range columns : {Range{0, 32}, Range{32, 96}}) {
      const Slab slab = slab_of(factor, columns, true);
      const at::Tensor own =
          expected.slice(0, columns.begin, columns.end).slice(1, columns.begin, columns.end);
      EXPECT_TRUE(at::allclose(slab.curvature, own, 1e-5, 1e-6));
    }
  }
}

TEST(Refine, NeverRaisesTheObjectiveAndHelps) {
  const Problem problem = random_problem(70, 256, 21);
  const at::Tensor h = damped(problem.h);
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const auto& [group, panel] : {std::pair{32, 384}, {32, 96}, {128, 96}, {0, 384}}) {
        for (const auto order : {ActOrder::none, ActOrder::static_groups}) {
          SCOPED_TRACE(fmt::format("{} bits, symmetric {}, group {}, panels of {}, act-order {}", bits,
                                   symmetric, group, panel, order != ActOrder::none));
          const GridSpec spec{.bits = bits, .group = group, .symmetric = symmetric};
          const Factor factor =
              factorize(problem.h, {.damping = kDamping, .act_order = order, .panel_width = panel});
          const QuantizedMatrix start = gptq(problem.w, factor, spec);
          const double first = reached(problem, h, start);
          double before = first;
          for (const int64_t sweeps : {1, 2, 4}) {
            const double after = reached(problem, h, refine(start, problem.w, factor, sweeps));
            EXPECT_LE(after, before * kRoundingSlack) << sweeps;
            before = after;
          }
          EXPECT_LT(before, first);
        }
      }
    }
  }
}

TEST(Refine, EndsWhenNothingIsToBeGained) {
  constexpr int64_t kMany = 1000;
  const Problem problem = random_problem(40, 96, 24);
  for (const bool symmetric : {true, false}) {
    const GridSpec spec{.bits = 3, .group = 32, .symmetric = symmetric};
    const Factor factor = factorize(problem.h, {.damping = kDamping, .panel_width = 32});
    Refiner refiner(gptq(problem.w, factor, spec), problem.w, factor);
    const auto visit = [&](bool loads) {
      for (const Range& columns : refinement_slabs(column_panels(96, 32), 32)) {
        const Slab slab = slab_of(factor, columns, !loads);
        loads ? refiner.load(slab) : refiner.sweep(slab);
      }
    };
    visit(true);
    EXPECT_FALSE(refiner.is_settled());
    int64_t n_sweeps = 0;
    for (; n_sweeps < kMany && !refiner.is_settled(); ++n_sweeps) visit(false);

    EXPECT_GT(n_sweeps, 1);
    EXPECT_LT(n_sweeps, kMany);
    const QuantizedMatrix settled = refiner.take();
    visit(false);
    EXPECT_TRUE(at::equal(refiner.take().codes, settled.codes));
    EXPECT_TRUE(at::equal(refiner.take().scale, settled.scale));
    EXPECT_TRUE(
        at::equal(refine(gptq(problem.w, factor, spec), problem.w, factor, kMany).codes, settled.codes));
  }
}

TEST(Refine, AgreesWithTheLiteralDescent) {
  Problem problem = random_problem(24, 64, 22);
  problem.h[5].zero_();
  problem.h.select(1, 5).zero_();
  const at::Tensor h = damped(problem.h);
  for (const int bits : {2, 3, 4}) {
    for (const bool symmetric : {true, false}) {
      for (const auto storage : {at::kBFloat16, at::kFloat}) {
        SCOPED_TRACE(fmt::format("{} bits, symmetric {}, {}", bits, symmetric, c10::toString(storage)));
        const GridSpec spec{.bits = bits, .group = 16, .symmetric = symmetric, .storage = storage};
        const QuantizedMatrix start = round_to_nearest(problem.w.masked_fill(h.diagonal() == 0, 0), {}, spec);

        for (const int64_t panel : {64, 16}) {
          const Factor factor = factorize(problem.h, {.damping = kDamping, .panel_width = panel});

          const QuantizedMatrix fast = refine(start, problem.w, factor, 2);
          const QuantizedMatrix slow =
              reference::refine(start, problem.w, h, 2, refinement_slabs(column_panels(64, panel), 16));

          const at::Tensor equal = (fast.codes == slow.codes).all(1) & (fast.zero == slow.zero).all(1);
          EXPECT_GE(equal.to(at::kDouble).mean().item<double>(), kMinRowsEqual);
          EXPECT_NEAR(reached(problem, h, fast) / reached(problem, h, slow), 1, kTotalObjectiveTolerance);
        }
      }
    }
  }
}

/// Least objective over all codes of one row on its grids.
static double brute_force(const Problem& problem, const at::Tensor& h, QuantizedMatrix matrix) {
  matrix.codes = matrix.codes.clone();
  const int64_t n_columns = matrix.codes.size(1), n_codes = 1LL << matrix.spec.bits;
  double best = std::numeric_limits<double>::infinity();
  int64_t n_all = 1;
  for (int64_t j = 0; j < n_columns; ++j) n_all *= n_codes;
  for (int64_t index = 0; index < n_all; ++index) {
    int64_t rest = index;
    auto* codes = matrix.codes.mutable_data_ptr<int8_t>();
    for (int64_t j = 0; j < n_columns; ++j, rest /= n_codes)
      codes[j] = static_cast<int8_t>(rest % n_codes - n_codes / 2);
    best = std::min(best, reached(problem, h, matrix));
  }
  return best;
}

TEST(Refine, ReachesTheOptimumOfTinyProblemsMoreOftenThanTheColumnLoop) {
  constexpr int kProblems = 40;
  int n_started_at_optimum = 0, n_refined_at_optimum = 0;
  for (uint64_t seed = 0; seed < kProblems; ++seed) {
    const Problem problem = random_problem(1, 4, 100 + seed);
    const at::Tensor h = damped(problem.h);
    const Factor factor = factorize(problem.h, {.damping = kDamping});
    const QuantizedMatrix start = gptq(problem.w, factor, {.bits = 2, .group = 0, .symmetric = true});
    const QuantizedMatrix refined = refine(start, problem.w, factor, 10);

    const double optimum = brute_force(problem, h, refined);

    EXPECT_GE(reached(problem, h, refined) * kRoundingSlack, optimum);
    n_refined_at_optimum += reached(problem, h, refined) <= optimum * kRoundingSlack;
    n_started_at_optimum += reached(problem, h, start) <= optimum * kRoundingSlack;
  }
  EXPECT_GT(n_refined_at_optimum, n_started_at_optimum);
  EXPECT_GE(n_refined_at_optimum, kProblems * 3 / 4);
}

TEST(Refine, IsOptimalAtOnceWithoutCorrelation) {
  const Problem problem = random_problem(3, 5, 23);
  const at::Tensor h = at::eye(5);
  QuantizedMatrix start = round_to_nearest(problem.w, {}, {.bits = 3, .group = 0});
  start.codes.zero_();

  const QuantizedMatrix refined = refine(start, problem.w, factorize(h, {}), 20);

  for (int64_t row = 0; row < 3; ++row) {
    const Problem one{problem.w.slice(0, row, row + 1), h};
    QuantizedMatrix of_row{refined.spec, refined.codes.slice(0, row, row + 1),
                           refined.scale.slice(0, row, row + 1), refined.zero.slice(0, row, row + 1)};
    EXPECT_LE(reached(one, h, of_row), brute_force(one, h, of_row) * kRoundingSlack);
  }
}

TEST(Refine, FindsTheScaleThatMadeTheWeights) {
  const at::Tensor w = (at::arange(-4, 4).repeat({4}).to(at::kFloat) * 0.25F).view({1, 32});
  const at::Tensor h = at::diag(random_problem(1, 32, 24).h.diagonal());
  QuantizedMatrix start = round_to_nearest(w, {}, {.bits = 3, .group = 0});
  start.scale.fill_(0.27);

  const QuantizedMatrix refined = refine(start, w, factorize(h, {}), 3);

  EXPECT_EQ(refined.scale.to(at::kFloat).item<float>(), 0.25F);
  EXPECT_TRUE(at::equal(dequantize(refined).to(at::kFloat), w));
}

TEST(Refine, DeadColumnsStayZero) {
  Problem problem = random_problem(10, 64, 25);
  problem.h[5].zero_();
  problem.h.select(1, 5).zero_();
  const GridSpec spec{.bits = 3, .group = 16, .symmetric = false};
  const Factor factor = factorize(problem.h, {.damping = kDamping});
  const QuantizedMatrix start = gptq(problem.w, factor, spec);

  const QuantizedMatrix refined = refine(start, problem.w, factor, 3);

  EXPECT_FALSE(at::equal(refined.codes, start.codes));
  EXPECT_EQ(dequantize(refined).select(1, 5).count_nonzero().item<int64_t>(), 0);
}

TEST(Refine, RowsHaveTheSameBitsInAnyTileAsInOneCall) {
  const Problem problem = random_problem(150, 320, 26);
  const Factor factor = factorize(problem.h, {.panel_width = 128});
  for (const GridSpec& spec :
       {GridSpec{.bits = 3, .group = 64}, GridSpec{.bits = 2, .group = 0, .symmetric = false}}) {
    const QuantizedMatrix start = gptq(problem.w, factor, spec);
    const QuantizedMatrix whole = refine(start, problem.w, factor, 3);
    for (const int64_t part : {kRowTile, int64_t{1}, int64_t{37}, int64_t{100}}) {
      std::vector<at::Tensor> codes, scale, zero;
      for (int64_t begin = 0; begin < 150; begin += part) {
        const auto rows = [&](const at::Tensor& t) {
          return t.slice(0, begin, std::min(begin + part, int64_t{150}));
        };
        const QuantizedMatrix tile = refine({spec, rows(start.codes), rows(start.scale), rows(start.zero)},
                                            rows(problem.w), factor, 3);
        codes.push_back(tile.codes);
        scale.push_back(tile.scale);
        zero.push_back(tile.zero);
      }
      EXPECT_TRUE(at::equal(at::cat(codes), whole.codes)) << part;
      EXPECT_TRUE(at::equal(at::cat(scale), whole.scale)) << part;
      EXPECT_TRUE(at::equal(at::cat(zero), whole.zero)) << part;
    }
  }
}

TEST(Refiner, KnowsTheUndampedObjectiveOfItsTiles) {
  Problem problem = random_problem(150, 128, 28);
  problem.h[5].zero_();
  problem.h.select(1, 5).zero_();
  const Factor factor = factorize(problem.h, {.damping = kDamping, .panel_width = 64});
  const QuantizedMatrix start = gptq(problem.w, factor, {.bits = 3, .group = 32});
  Refiner refiner(start, problem.w, factor);
  for (int64_t pass = 0; pass <= 2; ++pass)
    for (const Range& columns : refinement_slabs(column_panels(128, 64), 32)) {
      const Slab slab = slab_of(factor, columns, pass > 0);
      pass == 0 ? refiner.load(slab) : refiner.sweep(slab);
    }

  const at::Tensor objectives = refiner.objectives(kRowTile);
  const at::Tensor values = dequantize(refiner.take());

  ASSERT_EQ(objectives.size(0), 3);
  for (int64_t tile = 0; tile < 3; ++tile) {
    const int64_t begin = tile * kRowTile, end = std::min<int64_t>(150, begin + kRowTile);
    const double expected = objective(problem.w.slice(0, begin, end), values.slice(0, begin, end), problem.h);
    EXPECT_NEAR(objectives[tile].item<double>() / expected, 1, kObjectiveTolerance);
  }
}

}  // namespace isobath::quant
