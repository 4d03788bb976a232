#include <gtest/gtest.h>

#include <cmath>
#include <isobath/kernels/squares.hpp>
#include <limits>

namespace isobath::kernels {
namespace {

// f32 sums of up to 64 squares, or of as many a lane as a row has vectors, against f64.
constexpr double kTolerance = 4e-6;

bool near(const at::Tensor& found, const at::Tensor& expected) {
  return at::allclose(found.to(at::kDouble), expected, kTolerance, 0);
}

class Squares : public ::testing::TestWithParam<std::tuple<at::ScalarType, int64_t, int64_t>> {};

TEST_P(Squares, AgreeWithTheFormulasInF64) {
  const auto [dtype, n, d] = GetParam();
  at::manual_seed(9);
  const at::Tensor x = (at::randn({n, d}) * 3).to(dtype), weights = at::rand({n});
  const at::Tensor squares = x.to(at::kDouble).square();

  EXPECT_TRUE(near(row_squares(x), squares.sum(1)));
  const ChannelSquares found = channel_squares(x, weights);
  EXPECT_TRUE(near(found.plain, squares.sum(0)));
  EXPECT_TRUE(near(found.weighted, (squares * weights.to(at::kDouble).unsqueeze(1)).sum(0)));
  EXPECT_TRUE(at::equal(found.largest, x.to(at::kFloat).abs().amax(0)));
}

INSTANTIATE_TEST_SUITE_P(Shapes, Squares,
                         ::testing::Combine(::testing::Values(at::kFloat, at::kBFloat16, at::kHalf),
                                            ::testing::Values(1, 64, 131),
                                            ::testing::Values(1, 16, 77, 576)));

TEST(SquaresOfParts, ColumnsOfAWiderTensorAreRowsApart) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor whole = at::randn({2, 9, 40}).to(dtype), part = whole.slice(2, 3, 37);
    EXPECT_TRUE(at::equal(row_squares(part), row_squares(part.contiguous())));
    EXPECT_EQ(row_squares(part).sizes(), (at::IntArrayRef{2, 9}));
    const at::Tensor weights = at::rand({9});
    EXPECT_TRUE(at::equal(channel_squares(part[1], weights).weighted,
                          channel_squares(part[1].contiguous(), weights).weighted));
  }
}

TEST(SquaresRange, WhatIsNotFiniteStaysSo) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    at::Tensor x = at::ones({3, 20}).to(dtype);
    x[1][18] = std::numeric_limits<float>::quiet_NaN();
    x[2][3] = 1e30F;
    EXPECT_TRUE(std::isfinite(row_squares(x)[0].item<float>()));
    EXPECT_TRUE(std::isnan(row_squares(x)[1].item<float>()));
    EXPECT_TRUE(std::isinf(row_squares(x)[2].item<float>()));
    const ChannelSquares found = channel_squares(x, at::ones({3}));
    EXPECT_TRUE(std::isnan(found.plain[18].item<double>()));
    EXPECT_TRUE(std::isinf(found.weighted[3].item<double>()));
    EXPECT_EQ(found.plain[0].item<double>(), 3.0);
  }
}

}  // namespace
}  // namespace isobath::kernels
