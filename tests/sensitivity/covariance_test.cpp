#include <gtest/gtest.h>
#include <isobath/core/error.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <limits>
#include <sensitivity/golden.hpp>
#include <sensitivity/near.hpp>

namespace isobath::sensitivity {
namespace {

using testing::relative_error;

// f32 products summed over at most a few hundred tokens against f64.
constexpr double kSingleTolerance = 1e-5;
// √D·x is rounded to bf16 on both sides: 2⁻⁹ each, little averaged over 40 rows.
constexpr double kBf16WeightedTolerance = 0x1p-8;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Covariance, AgreesWithTheLiteralReference) {
  at::manual_seed(5);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = at::randn({40, 33}).to(dtype), weights = at::rand({40});
    Covariance weighted(33), plain(33);
    weighted.add(x, weights);
    plain.add(x, {});
    EXPECT_LT(
        relative_error(mirrored(weighted.take_upper()), covariance_reference(x.to(at::kDouble), weights)),
        dtype == at::kFloat ? kSingleTolerance : kBf16WeightedTolerance);
    EXPECT_LT(relative_error(mirrored(plain.take_upper()), covariance_reference(x.to(at::kDouble), {})),
              kSingleTolerance);
  }
}

TEST(Covariance, IsExactlySymmetricOverSeveralPanels) {
  at::manual_seed(6);
  for (const int64_t d : {1, 128, 129, 300, 1100}) {
    const at::Tensor x = at::randn({17, d}), weights = at::rand({17});
    Covariance covariance(d);
    covariance.add(x, weights);
    const at::Tensor h = mirrored(covariance.take_upper()), wide = x.to(at::kDouble);
    EXPECT_TRUE(at::equal(h, h.t())) << d;
    EXPECT_LT(relative_error(h, at::mm(wide.t(), wide * weights.unsqueeze(1))), kSingleTolerance) << d;
  }
}

TEST(Covariance, AddsUpOverCalls) {
  at::manual_seed(7);
  const at::Tensor x = at::randn({64, 20}), weights = at::rand({64});
  Covariance whole(20), parts(20);
  whole.add(x, weights);
  parts.add(x.slice(0, 0, 23), weights.slice(0, 0, 23));
  parts.add(x.slice(0, 23, 64), weights.slice(0, 23, 64));
  parts.add(x.slice(0, 64, 64), weights.slice(0, 64, 64));
  EXPECT_LT(relative_error(mirrored(parts.take_upper()), mirrored(whole.take_upper())), kSingleTolerance);
}

TEST(Covariance, AgreesWithTheOracle) {
  for (const char* name : testing::kGoldenModules) {
    const testing::GoldenModule golden(name);
    const at::Tensor x = golden["x"].flatten(0, 1);
    Covariance plain(x.size(1)), weighted(x.size(1));
    plain.add(x, golden.mask().flatten().to(at::kFloat));
    weighted.add(x, golden["token_weights_1"].flatten().to(at::kFloat));
    EXPECT_LT(relative_error(mirrored(plain.take_upper()), golden["xtx"]), testing::kGoldenTolerance) << name;
    EXPECT_LT(relative_error(mirrored(weighted.take_upper()), golden["xtdx"]), testing::kGoldenTolerance)
        << name;
  }
}

TEST(Covariance, TakesNothingFromRowsWithoutWeight) {
  const at::Tensor x = at::tensor({1.0F, 2.0F, 1e30F, kInfinity, 3.0F, 4.0F}).view({3, 2});
  Covariance covariance(2);
  covariance.add(x, at::tensor({1.0F, 0.0F, 2.0F}));
  EXPECT_TRUE(
      at::allclose(mirrored(covariance.take_upper()), at::tensor({19.0F, 26.0F, 26.0F, 36.0F}).view({2, 2})));
}

TEST(Covariance, NamesTheBadRowAndNotThePaddingBeforeIt) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    at::Tensor x = at::ones({5, 3}, dtype), weights = at::ones({5});
    x[1][0] = kInfinity;
    weights[1] = 0;
    x[3][1] = kInfinity;
    Covariance covariance(3);
    try {
      covariance.add(x, weights);
      FAIL() << "an infinite activation was accepted";
    } catch (const NumericError& error) {
      EXPECT_NE(std::string(error.what()).find("row 3"), std::string::npos) << error.what();
    }
    EXPECT_EQ(mirrored(covariance.take_upper()).abs().max().item<float>(), 0.0F);
  }
}

TEST(Covariance, NamesTheFirstRowThatIsNotFinite) {
  at::Tensor x = at::ones({5, 3});
  x[3][1] = kInfinity;
  Covariance covariance(3);
  try {
    covariance.add(x, at::ones({5}));
    FAIL() << "an infinite activation was accepted";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 3"), std::string::npos) << error.what();
  }
  EXPECT_THROW(covariance.add(at::ones({2, 3}), at::tensor({1.0F, -1.0F})), NumericError);
  EXPECT_THROW(covariance.add(at::full({2, 3}, 1e30F), {}), NumericError) << "squares beyond f32";
  EXPECT_THROW(covariance.add(at::ones({2, 4}), {}), InternalError);
  EXPECT_EQ(mirrored(covariance.take_upper()).abs().max().item<float>(), 0.0F)
      << "a refused batch leaves no trace";
}

TEST(CovariancePanels, AreThoseOfTheWholeMatrix) {
  at::manual_seed(8);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = at::randn({40, 130}).to(dtype), weights = at::rand({40});
    for (const int64_t first : {20, 48}) {  // not where a kernel's panel starts, and there
      // Not all columns, and not from the first on.
      const std::vector<Range> columns{{first, first + 48}, {first + 48, 128}};
      CovariancePanels panels(columns);
      panels.add(x.slice(0, 0, 15), weights.slice(0, 0, 15));
      panels.add(x.slice(0, 15), weights.slice(0, 15));
      const at::Tensor expected = covariance_reference(x.to(at::kDouble), weights);
      const std::vector<at::Tensor> taken = panels.take();
      for (size_t p = 0; p < columns.size(); ++p) {
        const auto [begin, end] = columns[p];
        ASSERT_EQ(taken[p].sizes(), (std::vector<int64_t>{end, end - begin}));
        const at::Tensor above = expected.slice(0, 0, end).slice(1, begin, end);
        EXPECT_LT(relative_error(taken[p].triu(-begin), above.triu(-begin)),
                  dtype == at::kFloat ? kSingleTolerance : kBf16WeightedTolerance);
      }
      panels.add(at::zeros_like(x), weights);
      EXPECT_EQ(panels.take()[1].abs().max().item<float>(), 0.0F) << "sums start again";
    }
  }
}

}  // namespace
}  // namespace isobath::sensitivity
