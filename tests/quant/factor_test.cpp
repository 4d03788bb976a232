#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/quant/factor.hpp>
#include <limits>

#include "quant/problem.hpp"

namespace isobath::quant {

/// R diag(R)⁻¹ is kept in f32: a rounding of 2⁻²⁴ an entry, in products as large as the diagonal of H.
constexpr double kFactorTolerance = 1e-5;

TEST(Factor, RootTimesItsTransposeIsDampedH) {
  for (const auto act_order : {ActOrder::none, ActOrder::static_groups})
    for (const int64_t width : {5, 16, 48, 100}) {
      const at::Tensor h = random_problem(1, 48, 11).h;
      const Factor factor = factorize(h, {.damping = 0.02, .act_order = act_order, .panel_width = width});

      at::Tensor damped = h.to(at::kDouble).clone();
      damped.diagonal().add_(0.02 * damped.diagonal().mean());
      damped = damped.index_select(0, factor.order).index_select(1, factor.order);
      const at::Tensor root = upper_root(factor);

      EXPECT_TRUE(at::equal(root, root.triu()));
      const double largest = damped.abs().max().item<double>();
      EXPECT_TRUE(at::allclose(root.mm(root.t()), damped, 0, kFactorTolerance * largest)) << width;
      EXPECT_EQ(factor.n_fallbacks, 0);
      EXPECT_DOUBLE_EQ(factor.damping, 0.02);
    }
}

TEST(Factor, PanelsAreCutIntoStepsWithoutChangingTheRoot) {
  // Wider than the 128 columns of a step, so that panels are factorized in several.
  const at::Tensor h = random_problem(1, 300, 13).h;
  const at::Tensor whole = upper_root(factorize(h, {.panel_width = 300}));
  for (const int64_t width : {64, 128, 200}) {
    const at::Tensor root = upper_root(factorize(h, {.panel_width = width}));
    EXPECT_TRUE(at::allclose(root, whole, kFactorTolerance, kFactorTolerance)) << width;
  }
}

TEST(Factor, ActOrderSortsTheDiagonalDescendingAndKeepsTies) {
  const at::Tensor h = at::diag(at::tensor({1.0F, 3.0F, 0.0F, 3.0F}));

  const Factor factor = factorize(h, {.act_order = ActOrder::static_groups});

  EXPECT_TRUE(at::equal(factor.order, at::tensor({1, 3, 0, 2}, at::kLong)));
}

TEST(Factor, DeadColumnsAreMarkedAndDoNotTouchOthers) {
  at::Tensor h = random_problem(1, 8, 2).h.clone();
  h[3].zero_();
  h.select(1, 3).zero_();

  const Factor factor = factorize(h, {});

  EXPECT_FALSE(factor.failed);
  EXPECT_EQ(factor.dead.nonzero().item<int64_t>(), 3);
  EXPECT_EQ(factor.importance[3].item<float>(), 1.0F);
  EXPECT_EQ(upper_root(factor)[3].count_nonzero().item<int64_t>(), 1);
  EXPECT_EQ(upper_root(factor).select(1, 3).count_nonzero().item<int64_t>(), 1);
}

TEST(Factor, AllDeadColumnsStillFactorize) {
  EXPECT_FALSE(factorize(at::zeros({4, 4}), {}).failed);
}

TEST(Factor, LadderRaisesTheDampingUntilPositiveDefinite) {
  // Eigenvalues 1 ± 1.05: needs λ > 0.05, so 0.01 fails and 0.1 works.
  const at::Tensor h = at::tensor({1.0F, 1.05F, 1.05F, 1.0F}).view({2, 2});

  const Factor factor = factorize(h, {.damping = 0.01, .max_damping = 1});

  EXPECT_FALSE(factor.failed);
  EXPECT_EQ(factor.n_fallbacks, 1);
  EXPECT_NEAR(factor.damping, 0.1, 1e-12);
}

TEST(Factor, ExhaustedLadderIsReportedNotThrown) {
  const at::Tensor h = at::tensor({1.0F, 5.0F, 5.0F, 1.0F}).view({2, 2});
  EXPECT_TRUE(factorize(h, {.damping = 0.01, .max_damping = 1}).failed);
}

TEST(Factor, NonFiniteHIsAnErrorThatNamesRowAndColumn) {
  at::Tensor h = at::eye(4);
  h[2][1] = std::numeric_limits<float>::quiet_NaN();
  try {
    (void)factorize(h, {});
    FAIL() << "expected NumericError";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 2, column 1"), std::string::npos) << error.what();
  }
}

}  // namespace isobath::quant
