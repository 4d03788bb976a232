// The source of the device's kernels, run by the host (support/cuda_on_host).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/kernels/device.hpp>
#include <limits>

#include "kernels/gram_cases.hpp"
#include "src/kernels/device_gram.hpp"

namespace isobath::kernels {
namespace {

// f32 sums of some hundred products against f64.
constexpr double kSumTolerance = 1e-6;

class DeviceGram : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  [[nodiscard]] static at::Tensor random(at::IntArrayRef shape) { return at::randn(shape).to(GetParam()); }
};

TEST_P(DeviceGram, AddsTheUpperTriangleOfRoundedProducts) {
  at::manual_seed(4);
  for (const int64_t d : {1, 7, 64, 130, 150})
    for (const int64_t n : {1, 31, 32, 257, 300}) {
      const at::Tensor x = random({n, d}), roots = at::rand({n});
      for (const at::Tensor& weights : {at::Tensor(), roots}) {
        at::Tensor upper = at::ones({d, d});
        ASSERT_TRUE(device::add_gram_panels({&upper, 1}, 0, x, weights));
        EXPECT_LT(relative(at::triu(upper), at::triu(literal_gram(x, weights) + 1.0)), kSumTolerance)
            << d << " " << n;
      }
    }
}

TEST_P(DeviceGram, GivesTheSameBitsInPanels) {
  at::manual_seed(7);
  constexpr int64_t kChannels = 330;
  const at::Tensor x = random({290, kChannels}), roots = at::rand({290});
  at::Tensor whole = at::ones({kChannels, kChannels});
  ASSERT_TRUE(device::add_gram_panels({&whole, 1}, 0, x, roots));
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 48}, {48, 240}, {240, 329}, {144, 330}}) {
    at::Tensor panel = at::ones({end, end - begin});
    ASSERT_TRUE(device::add_gram_panels({&panel, 1}, begin, x, roots));
    const at::Tensor expected = whole.slice(0, 0, end).slice(1, begin, end);
    EXPECT_TRUE(at::equal(at::triu(panel, -begin), at::triu(expected, -begin))) << begin << " " << end;
  }
}

TEST_P(DeviceGram, TakesRowsOfAWiderMatrix) {
  at::manual_seed(9);
  const at::Tensor x = random({70, 96}).slice(1, 3, 80);
  at::Tensor upper = at::zeros({77, 77});
  ASSERT_TRUE(device::add_gram_panels({&upper, 1}, 0, x, {}));
  EXPECT_LT(relative(at::triu(upper), at::triu(literal_gram(x, {}))), kSumTolerance);
}

TEST_P(DeviceGram, AddsProductsOfTwoMatrices) {
  at::manual_seed(6);
  for (const int64_t d : {3, 130}) {
    const at::Tensor a = random({300, d}), b = random({300, d});
    at::Tensor sum = at::ones({d, d});
    ASSERT_TRUE(device::add_product({&sum, 1}, a, b));
    EXPECT_LT(relative(sum, a.to(at::kDouble).t().mm(b.to(at::kDouble)) + 1.0), kSumTolerance) << d;
    if (d <= 48) continue;
    std::vector<at::Tensor> panels{at::ones({d, 48}), at::ones({d, d - 48})};
    ASSERT_TRUE(device::add_product(panels, a, b));
    EXPECT_TRUE(at::equal(at::cat(panels, 1), sum)) << d;
  }
}

TEST_P(DeviceGram, RefusesWhatIsNotFiniteAndLeavesTheSumAlone) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    at::Tensor x = at::ones({9, 60}).to(GetParam());
    x[7][50] = bad;
    at::Tensor upper = at::zeros({60, 60}), roots = at::ones({9});
    EXPECT_FALSE(device::add_gram_panels({&upper, 1}, 0, x, {}));
    EXPECT_FALSE(device::add_gram_panels({&upper, 1}, 0, x, roots));
    EXPECT_FALSE(device::add_product({&upper, 1}, at::ones_like(x), x));
    EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
    at::Tensor panel = at::zeros({48, 48});
    EXPECT_TRUE(device::add_gram_panels({&panel, 1}, 0, x, {}));  // the bad channel comes later
    roots[7] = 0;                                                 // a row without weight may hold anything
    EXPECT_TRUE(device::add_gram_panels({&upper, 1}, 0, x, roots));
    EXPECT_EQ(upper[0][0].item<float>(), 8.0F);
  }
}

TEST(DeviceGramRange, LeavesSumsThatMightOverflowToTheCaller) {
  at::Tensor x = at::ones({9, 60}), upper = at::zeros({60, 60});
  x[3][3] = 1e20F;
  EXPECT_FALSE(device::add_gram_panels({&upper, 1}, 0, x, {}));
  // Rounding to bf16 may overflow, too.
  EXPECT_FALSE(
      device::add_gram_panels({&upper, 1}, 0, at::ones({9, 60}, at::kBFloat16) * 3e38F, at::full({9}, 1.2F)));
  EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
}

TEST(DeviceProduct, ElementsDoNotDependOnTheOthers) {
  at::manual_seed(10);
  // Columns of a wider matrix, as the column loop's panels are.
  const at::Tensor a = at::randn({200, 90}).slice(1, 5, 75), b = at::randn({200, 150});
  at::Tensor sum = at::zeros({70, 150}), part = at::zeros({33, 20});
  add_device_product(sum, a, b);
  add_device_product(part, a.slice(1, 30, 63), b.slice(1, 101, 121));
  EXPECT_LT(relative(sum, a.to(at::kDouble).t().mm(b.to(at::kDouble))), kSumTolerance);
  EXPECT_TRUE(at::equal(part, sum.slice(0, 30, 63).slice(1, 101, 121)));
}

INSTANTIATE_TEST_SUITE_P(Dtypes, DeviceGram, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace isobath::kernels
