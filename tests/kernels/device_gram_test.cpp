#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <isobath/kernels/gram.hpp>
#include <limits>

#include "kernels/gram_cases.hpp"

namespace isobath::kernels {
namespace {

// Tensor cores cut low bits off their sums of 256 products; f32 sums of some hundred products against f64.
constexpr double kSumTolerance = 4e-6;

/// CUDA tensors; device_gram_on_host_test runs the same source on the host.
class DeviceGram : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no CUDA device on this machine";
  }
  [[nodiscard]] static at::Tensor random(at::IntArrayRef shape) { return at::randn(shape).to(GetParam()); }
};

TEST_P(DeviceGram, AgreesWithF64) {
  at::manual_seed(4);
  for (const int64_t d : {1, 48, 130, 700})
    for (const int64_t n : {1, 32, 257, 2000}) {
      const at::Tensor x = random({n, d}), roots = at::rand({n});
      at::Tensor upper = at::ones({d, d}, at::kCUDA);
      ASSERT_TRUE(has_gram(x.cuda()));
      ASSERT_TRUE(add_gram(upper, x.cuda(), roots.cuda()));
      EXPECT_LT(relative(upper.cpu().triu(), (literal_gram(x, roots) + 1.0).triu()), kSumTolerance)
          << d << " " << n;
    }
}

TEST_P(DeviceGram, GivesTheSameBitsInPanelsAndAgain) {
  at::manual_seed(7);
  const at::Tensor x = random({300, 400}).cuda(), roots = at::rand({300}).cuda();
  at::Tensor whole = at::ones({400, 400}, at::kCUDA), again = whole.clone();
  ASSERT_TRUE(add_gram(whole, x, roots));
  ASSERT_TRUE(add_gram(again, x, roots));
  EXPECT_TRUE(at::equal(whole.triu(), again.triu()));
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 48}, {48, 240}, {144, 400}}) {
    at::Tensor panel = at::ones({end, end - begin}, at::kCUDA);
    ASSERT_TRUE(add_gram_panels({&panel, 1}, begin, x, roots));
    const at::Tensor expected = whole.slice(0, 0, end).slice(1, begin, end);
    EXPECT_TRUE(at::equal(at::triu(panel, -begin), at::triu(expected, -begin))) << begin << " " << end;
  }
}

TEST_P(DeviceGram, AddsProductsOfTwoMatrices) {
  at::manual_seed(6);
  const at::Tensor a = random({300, 130}), b = random({300, 130});
  at::Tensor sum = at::zeros({130, 130}, at::kCUDA);
  ASSERT_TRUE(add_product(sum, a.cuda(), b.cuda()));
  EXPECT_LT(relative(sum.cpu(), a.to(at::kDouble).t().mm(b.to(at::kDouble))), kSumTolerance);
}

TEST_P(DeviceGram, RefusesWhatIsNotFiniteAndLeavesTheSumAlone) {
  at::Tensor x = at::ones({9, 60}).to(GetParam());
  x[7][50] = std::numeric_limits<float>::infinity();
  at::Tensor upper = at::zeros({60, 60}, at::kCUDA), roots = at::ones({9});
  EXPECT_FALSE(add_gram(upper, x.cuda(), {}));
  EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
  roots[7] = 0;
  EXPECT_TRUE(add_gram(upper, x.cuda(), roots.cuda()));
  EXPECT_EQ(upper[0][0].item<float>(), 8.0F);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, DeviceGram, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace isobath::kernels
