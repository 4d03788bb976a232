#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/sensitivity/cross_covariance.hpp>
#include <limits>
#include <sensitivity/near.hpp>

namespace isobath::sensitivity {
namespace {

using testing::relative_error;

// f32 products summed over at most a few hundred tokens against f64.
constexpr double kSingleTolerance = 1e-5;
// D·(x̃ − x) of bf16 inputs is rounded to bf16: 2⁻⁹, little averaged over 40 rows.
constexpr double kBf16Tolerance = 0x1p-8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(CrossCovariance, AgreesWithTheLiteralReferenceAndAddsUpOverCalls) {
  at::manual_seed(15);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = at::randn({40, 33}).to(dtype), original = (x + 0.1 * at::randn({40, 33})).to(dtype);
    const at::Tensor weights = at::rand({40});
    CrossCovariance weighted(33), plain(33);
    weighted.add(x.slice(0, 0, 17), original.slice(0, 0, 17), weights.slice(0, 0, 17));
    weighted.add(x.slice(0, 17), original.slice(0, 17), weights.slice(0, 17));
    plain.add(x, original, {});
    const at::Tensor wide = x.to(at::kDouble), wide_original = original.to(at::kDouble);
    EXPECT_LT(relative_error(weighted.take()[0], cross_covariance_reference(wide, wide_original, weights)),
              dtype == at::kFloat ? kSingleTolerance : kBf16Tolerance);
    EXPECT_LT(relative_error(plain.take()[0], cross_covariance_reference(wide, wide_original, {})),
              dtype == at::kFloat ? kSingleTolerance : kBf16Tolerance);
  }
}

TEST(CrossCovariance, ColumnsAreThoseOfTheWholeAndStartAgainOnceTaken) {
  at::manual_seed(16);
  const at::Tensor x = at::randn({40, 130}), original = x + 0.1 * at::randn({40, 130});
  CrossCovariance whole(130);
  whole.add(x, original, {});
  const at::Tensor expected = whole.take()[0];
  for (const int64_t middle : {20, 58}) {  // where no panel of a kernel ends, and where one does
    CrossCovariance columns(130, {{10, middle}, {middle, 130}}, c10::Device(c10::kCPU));
    columns.add(x, original, {});
    const std::vector<at::Tensor> found = columns.take();
    EXPECT_LT(relative_error(at::cat(found, 1).to(at::kDouble), expected.slice(1, 10).to(at::kDouble)),
              kSingleTolerance);
    EXPECT_EQ(found[0].size(1), middle - 10);
    EXPECT_EQ(columns.take()[1].count_nonzero().item<int64_t>(), 0);
  }
}

TEST(CrossCovariance, ResidualRowsStandBelowThoseOfTheInput) {
  at::manual_seed(17);
  const at::Tensor x = at::randn({40, 12}), original = x + 0.1 * at::randn({40, 12}),
                   weights = at::rand({40});
  const at::Tensor residual = at::randn({40, 5});
  CrossCovariance with(12, c10::Device(c10::kCPU), 5), without(12);
  with.add(x, original, weights, residual);
  without.add(x, original, weights);
  const at::Tensor found = with.take()[0];
  ASSERT_EQ(found.sizes(), (at::IntArrayRef{17, 12}));
  EXPECT_LT(relative_error(found.slice(0, 0, 12).to(at::kDouble), without.take()[0].to(at::kDouble)),
            kSingleTolerance);
  // Σ_i D_i r_i x_iᵀ: the deviation of a stream that is x + r from one that is x, where channels allow it.
  const at::Tensor expected = residual.to(at::kDouble).t().mm((x * weights.unsqueeze(1)).to(at::kDouble));
  EXPECT_LT(relative_error(found.slice(0, 12).to(at::kDouble), expected), kSingleTolerance);
}

TEST(CrossCovariance, RowsAreChannelsOfTheDeviation) {
  CrossCovariance c(2);
  c.add(at::tensor({1.0F, 2.0F}).view({1, 2}), at::tensor({1.0F, 5.0F}).view({1, 2}), at::tensor({2.0F}));
  EXPECT_TRUE(at::equal(c.take()[0], at::tensor({0.0F, 0.0F, 6.0F, 12.0F}).view({2, 2})));
}

TEST(CrossCovariance, TakesNothingFromRowsWithoutWeightAndNamesOthersThatAreNotFinite) {
  const at::Tensor x = at::tensor({1.0F, 2.0F, kInfinity, 0.0F}).view({2, 2});
  const at::Tensor original = at::tensor({2.0F, 2.0F, 0.0F, kInfinity}).view({2, 2});
  CrossCovariance c(2);
  c.add(x, original, at::tensor({1.0F, 0.0F}));
  EXPECT_TRUE(at::equal(c.take()[0], at::tensor({1.0F, 2.0F, 0.0F, 0.0F}).view({2, 2})));
  try {
    c.add(x, original, {});
    FAIL() << "an infinite activation was accepted";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 1"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace isobath::sensitivity
