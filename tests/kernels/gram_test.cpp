#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <isobath/kernels/gram.hpp>
#include <limits>

#include "kernels/gram_cases.hpp"

namespace isobath::kernels {
namespace {

// f32 sums of some hundred products against f64.
constexpr double kSumTolerance = 1e-6;

/// bf16 runs where the machine has AVX-512 BF16, f32 where it has AVX2.
class Gram : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    if (!has_gram(random({1, 1}))) GTEST_SKIP() << "no kernel for this dtype on this machine";
  }
  [[nodiscard]] static at::Tensor random(at::IntArrayRef shape) { return at::randn(shape).to(GetParam()); }
};

TEST_P(Gram, AddsTheUpperTriangleOfRoundedProducts) {
  at::manual_seed(4);
  for (const int64_t d : {1, 16, 23, 24, 25, 47, 48, 49, 144, 150, 300})
    for (const int64_t n : {1, 2, 255, 256, 257, 700}) {
      const at::Tensor x = random({n, d}), roots = at::rand({n});
      for (const at::Tensor& weights : {at::Tensor(), roots}) {
        at::Tensor upper = at::ones({d, d});
        ASSERT_TRUE(add_gram(upper, x, weights));
        EXPECT_LT(relative(at::triu(upper), at::triu(literal_gram(x, weights) + 1.0)), kSumTolerance)
            << d << " " << n;
      }
    }
}

TEST_P(Gram, GivesTheSameBitsInPanels) {
  at::manual_seed(7);
  constexpr int64_t kChannels = 400;
  const at::Tensor x = random({300, kChannels}), roots = at::rand({300});
  at::Tensor whole = at::ones({kChannels, kChannels});
  ASSERT_TRUE(add_gram(whole, x, roots));
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 48}, {48, 240}, {240, 399}, {144, 400}}) {
    at::Tensor panel = at::ones({end, end - begin});
    ASSERT_TRUE(add_gram_panels({&panel, 1}, begin, x, roots));
    const at::Tensor expected = whole.slice(0, 0, end).slice(1, begin, end);
    // Element (i, j) stands on or above the diagonal where i <= begin + j.
    EXPECT_TRUE(at::equal(at::triu(panel, -begin), at::triu(expected, -begin))) << begin << " " << end;
  }
  // Side by side, in one call.
  std::vector<at::Tensor> panels{at::ones({144, 96}), at::ones({240, 96}), at::ones({399, 159})};
  ASSERT_TRUE(add_gram_panels(panels, 48, x, roots));
  for (const at::Tensor& panel : panels) {
    const int64_t end = panel.size(0), begin = end - panel.size(1);
    const at::Tensor expected = whole.slice(0, 0, end).slice(1, begin, end);
    EXPECT_TRUE(at::equal(at::triu(panel, -begin), at::triu(expected, -begin))) << begin;
  }
}

TEST_P(Gram, GivesTheSameBitsWhenTokensComeInChunks) {
  at::manual_seed(8);
  // More words than are packed at once, beside a slice that is packed whole.
  const at::Tensor x = random({1300, 3400});
  at::Tensor part = at::zeros({48, 48}), all = at::zeros({3400, 3400});
  ASSERT_TRUE(add_gram(all, x, {}));
  ASSERT_TRUE(add_gram_panels({&part, 1}, 0, x, {}));
  EXPECT_TRUE(at::equal(at::triu(part), at::triu(all.slice(0, 0, 48).slice(1, 0, 48))));
  EXPECT_LT(relative(part.triu(), literal_gram(x.slice(1, 0, 48), {}).triu()), kSumTolerance);
}

TEST_P(Gram, AddsProductsOfTwoMatrices) {
  at::manual_seed(6);
  // The last is packed in chunks of tokens on account of its left side.
  for (const auto& [n, d, w] :
       {std::tuple{300, 3, 3}, {300, 48, 48}, {300, 130, 130}, {300, 130, 50}, {1300, 3400, 20}}) {
    const at::Tensor a = random({n, d}), b = random({n, w + 7}).slice(1, 7);
    at::Tensor sum = at::ones({d, w});
    ASSERT_TRUE(add_product(sum, a, b));
    EXPECT_LT(relative(sum, a.to(at::kDouble).t().mm(b.to(at::kDouble)) + 1.0), kSumTolerance) << d;
    if (w <= 48) continue;
    std::vector<at::Tensor> panels{at::ones({d, 48}), at::ones({d, w - 48})};
    ASSERT_TRUE(add_product(panels, a, b));
    EXPECT_TRUE(at::equal(at::cat(panels, 1), sum)) << d;
  }
}

TEST_P(Gram, GivesTheSameBitsOnOneAndThreeThreads) {
  at::manual_seed(5);
  const at::Tensor x = random({300, 250});
  at::Tensor one = at::zeros({250, 250}), three = at::zeros({250, 250});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  ASSERT_TRUE(add_gram(one, x, {}));
  at::set_num_threads(3);
  ASSERT_TRUE(add_gram(three, x, {}));
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(one.triu(), three.triu()));
}

TEST_P(Gram, RefusesWhatIsNotFiniteAndLeavesTheSumAlone) {
  for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    at::Tensor x = at::ones({9, 60}).to(GetParam());
    x[7][50] = bad;
    at::Tensor upper = at::zeros({60, 60}), roots = at::ones({9});
    EXPECT_FALSE(add_gram(upper, x, {}));
    EXPECT_FALSE(add_gram(upper, x, roots));
    EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
    at::Tensor panel = at::zeros({48, 48});
    EXPECT_TRUE(add_gram_panels({&panel, 1}, 0, x, {}));  // the bad channel comes later
    roots[7] = 0;                                         // a row without weight may hold anything
    EXPECT_TRUE(add_gram(upper, x, roots));
    EXPECT_EQ(upper[0][0].item<float>(), 8.0F);
  }
}

TEST(GramRange, LeavesF32SumsThatMightOverflowToTheCaller) {
  at::Tensor x = at::ones({9, 60}), upper = at::zeros({60, 60});
  if (!has_gram(x)) GTEST_SKIP() << "no AVX2 on this machine";
  x[3][3] = 1e20F;
  EXPECT_FALSE(add_gram(upper, x, {}));
  EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Gram, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace isobath::kernels
