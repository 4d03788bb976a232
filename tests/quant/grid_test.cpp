#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/quant/grid.hpp>
#include <isobath/quant/reference.hpp>
#include <isobath/quant/solver.hpp>

#include "quant/problem.hpp"

namespace isobath::quant {

/// The fast fit sums errors in f32, the reference in f64; both choose among the same candidates.
constexpr double kFitTolerance = 1e-4;

static double weighted_error(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec) {
  const QuantizedMatrix matrix = round_to_nearest(w, importance, spec);
  const at::Tensor difference = dequantize(matrix).to(at::kDouble) - w.to(at::kDouble);
  return (importance.to(at::kDouble) * difference * difference).sum().item<double>();
}

TEST(Grid, GroupsMustDivideTheColumns) {
  EXPECT_EQ(n_groups(576, {.group = 64}), 9);
  EXPECT_EQ(n_groups(576, {.group = 0}), 1);

  EXPECT_THROW((void)n_groups(576, {.group = 128}), ConfigError);
  EXPECT_THROW((void)n_groups(576, {.bits = 7}), ConfigError);
  EXPECT_THROW((void)n_groups(576, {.storage = at::kDouble}), ConfigError);
}

TEST(Grid, MinMaxSymmetricScaleIsWhatCompressedTensorsComputes) {
  const at::Tensor w = at::tensor({-3.0F, 1.0F, 2.0F, 0.5F}).view({1, 4});

  const GroupGrid grid = fit_grid(w, {}, {.bits = 4, .clip_search = false, .storage = at::kFloat});

  EXPECT_FLOAT_EQ(grid.scale.item<float>(), 3.0F / 7.5F);
  EXPECT_EQ(grid.zero.item<int>(), 0);
}

TEST(Grid, MinMaxAsymmetricGridCoversZeroAndBothEnds) {
  const at::Tensor w = at::tensor({-1.0F, 0.0F, 2.0F, 0.5F}).view({1, 4});

  const GroupGrid grid =
      fit_grid(w, {}, {.bits = 2, .symmetric = false, .clip_search = false, .storage = at::kFloat});

  EXPECT_FLOAT_EQ(grid.scale.item<float>(), 1.0F);
  EXPECT_EQ(grid.zero.item<int>(), -1);
}

TEST(Grid, RoundingOnFixedGridsGivesTheBitsThatCodesGive) {
  at::manual_seed(3);
  const at::Tensor w = at::randn({70, 128});
  for (const bool symmetric : {true, false}) {
    for (const at::ScalarType storage : {at::kBFloat16, at::kFloat}) {
      for (const int bits : {2, 3, 4, 8}) {
        const GridSpec spec{.bits = bits, .group = 32, .symmetric = symmetric, .storage = storage};
        const QuantizedMatrix matrix = round_to_nearest(w, {}, spec);

        const at::Tensor found = round_on_grid(w, matrix.scale, matrix.zero, spec);

        EXPECT_TRUE(at::equal(found, dequantize(matrix).to(at::kFloat))) << bits << symmetric << storage;
      }
    }
  }
}

TEST(Grid, DequantizeIsCodeMinusZeroTimesScaleRoundedOnce) {
  QuantizedMatrix matrix{{.bits = 4, .group = 2, .symmetric = false, .storage = at::kBFloat16},
                         at::tensor({-8, 7, 1, 0}, at::kChar).view({1, 4}),
                         at::tensor({0.1F, 2.0F}).to(at::kBFloat16).view({1, 2}),
                         at::tensor({-1, 1}, at::kChar).view({1, 2})};

  const at::Tensor w = dequantize(matrix);

  const at::Tensor expected = (at::tensor({-7.0F, 8.0F, 0.0F, -1.0F}) *
                               at::tensor({0.1F, 0.1F, 2.0F, 2.0F}).to(at::kBFloat16).to(at::kFloat))
                                  .to(at::kBFloat16);
  EXPECT_TRUE(at::equal(w.view(-1), expected));
}

TEST(Grid, ClipSearchIsNeverWorseThanMinMax) {
  const Problem problem = random_problem(16, 128, 7);
  const at::Tensor importance = problem.h.diagonal().contiguous();
  for (const auto storage : {at::kBFloat16, at::kHalf, at::kFloat}) {
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      for (const bool symmetric : {true, false}) {
        GridSpec spec{
            .bits = bits, .group = 32, .symmetric = symmetric, .clip_search = true, .storage = storage};
        const double searched = weighted_error(problem.w, importance, spec);
        spec.clip_search = false;
        EXPECT_LT(searched, weighted_error(problem.w, importance, spec)) << bits << symmetric << storage;
      }
    }
  }
}

TEST(Grid, ClipSearchFindsTheGridThatMadeTheWeights) {
  // Codes -4 … 3 all occur, so that the exact grid has error 0.
  const at::Tensor w = (at::arange(-4, 4).repeat({4}).to(at::kFloat) * 0.25F).view({1, 32});

  const GroupGrid grid = fit_grid(w, {}, {.bits = 3, .group = 0});

  EXPECT_EQ(grid.scale.to(at::kFloat).item<float>(), 0.25F);
}

TEST(Grid, FitAgreesWithTheReferenceInErrorReached) {
  const Problem problem = random_problem(12, 96, 3);
  const at::Tensor importance = problem.h.diagonal().contiguous();
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const auto storage : {at::kBFloat16, at::kHalf}) {
        const GridSpec spec{
            .bits = bits, .group = 0, .symmetric = symmetric, .clip_search = true, .storage = storage};
        const GroupGrid slow = reference::fit_grid(problem.w, importance, spec);
        const at::Tensor steps =
            at::round(problem.w.to(at::kDouble) / slow.scale.to(at::kDouble).unsqueeze(1));
        const at::Tensor codes =
            (steps + slow.zero.unsqueeze(1)).clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1);
        const QuantizedMatrix matrix{spec, codes.to(at::kChar), slow.scale.unsqueeze(1),
                                     slow.zero.unsqueeze(1)};
        const at::Tensor difference = dequantize(matrix).to(at::kDouble) - problem.w;
        const double expected = (importance * difference * difference).sum().item<double>();
        EXPECT_NEAR(weighted_error(problem.w, importance, spec) / expected, 1, kFitTolerance)
            << bits << symmetric;
      }
    }
  }
}

TEST(Grid, DegenerateGroupsGetAPositiveFiniteScale) {
  const at::Tensor zeros = at::zeros({1, 16}), tiny = at::full({1, 16}, 1e-9F),
                   huge = at::full({1, 16}, -6.5e4F), least = at::full({1, 16}, 1e-42F);
  for (const auto storage : {at::kBFloat16, at::kHalf, at::kFloat}) {
    for (const bool symmetric : {true, false}) {
      const GridSpec spec{
          .bits = 2, .group = 0, .symmetric = symmetric, .clip_search = true, .storage = storage};
      for (const at::Tensor& w : {zeros, tiny, huge, least}) {
        const QuantizedMatrix matrix = round_to_nearest(w, {}, spec);
        const double scale = matrix.scale.to(at::kDouble).item<double>();
        EXPECT_TRUE(scale > 0 && std::isfinite(scale)) << scale;
        EXPECT_TRUE(at::isfinite(dequantize(matrix)).all().item<bool>());
      }
      EXPECT_EQ(dequantize(round_to_nearest(zeros, {}, spec)).count_nonzero().item<int>(), 0);
    }
  }
}

TEST(Grid, ConstantGroupsAreExactWhenTheScaleIs) {
  const at::Tensor w = at::full({1, 16}, 0.75F);
  const QuantizedMatrix matrix = round_to_nearest(w, {}, {.bits = 2, .group = 0, .symmetric = false});
  EXPECT_TRUE(at::equal(dequantize(matrix).to(at::kFloat), w));
}

TEST(Grid, ImportanceMayBeFarOutsideTheRangeOfF32Squares) {
  const Problem problem = random_problem(4, 64, 5);
  const at::Tensor importance = problem.h.diagonal().contiguous();
  const GridSpec spec{.bits = 3, .group = 0};

  const GroupGrid usual = fit_grid(problem.w, importance, spec),
                  scaled = fit_grid(problem.w, importance * 0x1p-110, spec);

  EXPECT_TRUE(at::equal(usual.scale, scaled.scale));
}

TEST(Grid, BitsPerWeightCountScalesAndPackedZeros) {
  EXPECT_DOUBLE_EQ(bits_per_weight(512, {.bits = 4, .group = 128}), 4.125);
  EXPECT_DOUBLE_EQ(bits_per_weight(512, {.bits = 3, .group = 64, .symmetric = false}), 3 + 19.0 / 64);
  EXPECT_DOUBLE_EQ(bits_per_weight(512, {.bits = 2, .group = 0, .storage = at::kFloat}), 2 + 32.0 / 512);
}

}  // namespace isobath::quant
