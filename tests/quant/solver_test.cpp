#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/quant/reference.hpp>
#include <isobath/quant/solver.hpp>

#include "quant/problem.hpp"

namespace isobath::quant {

/// f32 against f64 over ~300 columns, rows without a tie.
constexpr double kObjectiveTolerance = 1e-5;
/// A code at a tie, or two grids of almost equal error, may flip between f32 and f64; its whole row then
/// differs.
constexpr double kMinRowsEqual = 0.9;
constexpr double kTotalObjectiveTolerance = 5e-3;

/// The sum over columns less λ‖ΔW‖², each from f32 parts, against a product with H in f32.
constexpr double kFreeObjectiveTolerance = 1e-4;

struct Case {
  int bits;
  int64_t group;
  bool symmetric;
  ActOrder act_order;
  bool clip_search;
  int64_t panel_width = kPanel;
  int64_t tile_rows = kRowTile;
};

static void expect_agrees_with_reference(const Problem& problem, const Case& c) {
  SCOPED_TRACE(fmt::format("{} bits, group {}, symmetric {}, act-order {}, clip {}, panels {}, tiles {}",
                           c.bits, c.group, c.symmetric, c.act_order != ActOrder::none, c.clip_search,
                           c.panel_width, c.tile_rows));
  const GridSpec spec{
      .bits = c.bits, .group = c.group, .symmetric = c.symmetric, .clip_search = c.clip_search};
  const FactorSpec spec_of_factor{.act_order = c.act_order, .panel_width = c.panel_width};
  const Factor factor = factorize(problem.h, spec_of_factor);
  RowSolver solver(problem.w, factor, spec, c.tile_rows);
  for (const at::Tensor& panel : factor.panels) solver.advance(panel);
  const at::Tensor objectives = solver.objectives();
  const QuantizedMatrix fast = solver.take();
  const QuantizedMatrix slow = reference::gptq(problem.w, problem.h, spec_of_factor, spec);

  const at::Tensor equal = (fast.codes == slow.codes).all(1) & (fast.scale == slow.scale).all(1);
  EXPECT_GE(equal.to(at::kDouble).mean().item<double>(), kMinRowsEqual);
  const at::Tensor rows = equal.nonzero().view(-1);
  const auto objective_of = [&](const QuantizedMatrix& matrix, const at::Tensor& at) {
    return objective(problem.w.index_select(0, at), dequantize(matrix).index_select(0, at), problem.h);
  };
  EXPECT_NEAR(objective_of(fast, rows) / objective_of(slow, rows), 1, kObjectiveTolerance);
  const at::Tensor all = at::arange(problem.w.size(0), at::kLong);
  EXPECT_NEAR(objective_of(fast, all) / objective_of(slow, all), 1, kTotalObjectiveTolerance);

  EXPECT_EQ(objectives.size(0), (problem.w.size(0) + c.tile_rows - 1) / c.tile_rows);
  EXPECT_NEAR(objectives.sum().item<double>() / objective_of(fast, all), 1, kFreeObjectiveTolerance);
  FactoredObjective factored(dequantize(fast).to(at::kFloat) - problem.w, factor);
  for (const at::Tensor& panel : factor.panels) factored.advance(panel);
  EXPECT_NEAR(factored.value() / objective_of(fast, all), 1, kFreeObjectiveTolerance);
}

TEST(Gptq, AgreesWithTheLiteralAlgorithm) {
  const Problem problem = random_problem(40, 192, 1);
  for (const auto act_order : {ActOrder::none, ActOrder::static_groups}) {
    for (const int bits : {2, 3, 4, 8}) {
      expect_agrees_with_reference(problem, {bits, 32, true, act_order, true});
      expect_agrees_with_reference(problem, {bits, 64, false, act_order, false});
    }
    expect_agrees_with_reference(problem, {3, 32, false, act_order, true});
  }
}

TEST(Gptq, GroupsThatDoNotMatchTheLazyBlocksAreFittedOnCurrentColumns) {
  const Problem problem = random_problem(20, 576, 4);
  // 96 and 48 do not divide 128; 192, 288 and the whole row span several lazy blocks.
  for (const int64_t group : {48, 96, 192, 288, 0}) {
    expect_agrees_with_reference(problem, {4, group, true, ActOrder::none, false});
    expect_agrees_with_reference(problem, {4, group, true, ActOrder::static_groups, false});
  }
}

TEST(Gptq, PanelsMayCutBlocksAndGroupsAnywhere) {
  const Problem problem = random_problem(20, 576, 5);
  for (const int64_t width : {50, 200})
    for (const int64_t group : {32, 96, 192, 288, 0})
      expect_agrees_with_reference(problem, {3, group, true, ActOrder::none, false, width});
  expect_agrees_with_reference(problem, {3, 64, false, ActOrder::static_groups, false, 100});
}

TEST(Gptq, TallTilesAgreeWithTheLiteralAlgorithm) {
  const Problem problem = random_problem(150, 320, 12);
  for (const int64_t tile_rows : {128, 256})
    for (const int64_t group : {32, 160})
      expect_agrees_with_reference(problem, {3, group, true, ActOrder::none, true, 100, tile_rows});
}

TEST(Gptq, TileRowsDependOnTheShapeAlone) {
  EXPECT_EQ(tile_rows(1), 64);
  EXPECT_EQ(tile_rows(4096), 64);
  EXPECT_EQ(tile_rows(8192), 128);
  EXPECT_EQ(tile_rows(16384), 256);
  EXPECT_EQ(tile_rows(128256), 256);
}

TEST(Gptq, DeadColumnsBecomeZero) {
  Problem problem = random_problem(10, 64, 6);
  problem.h[5].zero_();
  problem.h.select(1, 5).zero_();

  expect_agrees_with_reference(problem, {4, 16, false, ActOrder::static_groups, true});

  const QuantizedMatrix matrix =
      gptq(problem.w, factorize(problem.h, {}), {.bits = 4, .group = 16, .symmetric = false});
  EXPECT_EQ(dequantize(matrix).select(1, 5).count_nonzero().item<int64_t>(), 0);
}

TEST(Gptq, RowsHaveTheSameBitsInAnyTileAsInOneCall) {
  const Problem problem = random_problem(150, 320, 8);
  for (const auto act_order : {ActOrder::none, ActOrder::static_groups}) {
    const Factor factor = factorize(problem.h, {.act_order = act_order});
    for (const GridSpec& spec :
         {GridSpec{.bits = 3, .group = 64}, GridSpec{.bits = 2, .group = 0, .symmetric = false}}) {
      const QuantizedMatrix whole = gptq(problem.w, factor, spec);
      for (const int64_t part : {kRowTile, int64_t{1}, int64_t{37}, int64_t{100}}) {
        std::vector<at::Tensor> codes, scale, zero;
        for (const at::Tensor& rows : problem.w.split(part)) {
          const QuantizedMatrix tile = gptq(rows, factor, spec);
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
}

TEST(Gptq, BeatsRoundToNearestAndClipSearchHelps) {
  const Problem problem = random_problem(64, 256, 9);
  const Factor factor = factorize(problem.h, {});
  for (const bool symmetric : {true, false}) {
    const GridSpec searched{.bits = 3, .group = 64, .symmetric = symmetric};
    GridSpec min_max = searched;
    min_max.clip_search = false;

    const double solved = objective(problem.w, dequantize(gptq(problem.w, factor, searched)), problem.h);

    EXPECT_LT(solved, objective(problem.w, dequantize(gptq(problem.w, factor, min_max)), problem.h));
    const at::Tensor nearest = dequantize(round_to_nearest(problem.w, factor.importance, searched));
    EXPECT_LT(solved, 0.8 * objective(problem.w, nearest, problem.h));
  }
}

TEST(Gptq, WithoutCorrelationItIsRoundToNearest) {
  const Problem problem = random_problem(9, 128, 10);
  const GridSpec spec{.bits = 4, .group = 32};

  const QuantizedMatrix solved = gptq(problem.w, factorize(at::eye(128), {}), spec);

  EXPECT_TRUE(at::equal(solved.codes, round_to_nearest(problem.w, {}, spec).codes));
}

TEST(Gptq, NonFiniteWeightsAreAnErrorThatNamesThePlace) {
  at::Tensor w = at::zeros({4, 32});
  w[3][17] = std::numeric_limits<float>::infinity();
  try {
    (void)gptq(w, factorize(at::eye(32), {}), {.group = 32});
    FAIL() << "expected NumericError";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 3, column 17"), std::string::npos) << error.what();
  }
}

TEST(Objective, IsHalfTheTraceOfTheWeightedSquare) {
  const at::Tensor w = at::zeros({1, 2}), w_hat = at::tensor({1.0F, 2.0F}).view({1, 2});
  const at::Tensor h = at::tensor({2.0F, 1.0F, 1.0F, 3.0F}).view({2, 2});
  EXPECT_DOUBLE_EQ(objective(w, w_hat, h), 0.5 * (2 + 2 * 2 + 12));
}

}  // namespace isobath::quant
