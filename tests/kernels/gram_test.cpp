#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <isobath/kernels/gram.hpp>
#include <limits>

namespace isobath::kernels {
namespace {

// f32 sums of exact products against f64.
constexpr double kSumTolerance = 1e-6;

/// What add_gram promises, in f64, rounding included.
at::Tensor literal(const at::Tensor& x, const at::Tensor& roots) {
  at::Tensor rounded = x.to(at::kFloat);
  if (roots.defined()) rounded = (rounded * roots.unsqueeze(1)).to(at::kBFloat16);
  const at::Tensor wide = rounded.to(at::kDouble);
  return wide.t().mm(wide);
}

TEST(Gram, AddsTheUpperTriangleOfRoundedProducts) {
  at::manual_seed(4);
  for (const int64_t d : {1, 16, 47, 48, 49, 96, 200})
    for (const int64_t n : {1, 2, 255, 256, 257, 700}) {
      const at::Tensor x = at::randn({n, d}).to(at::kBFloat16), roots = at::rand({n});
      if (!has_gram(x)) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
      for (const at::Tensor& weights : {at::Tensor(), roots}) {
        at::Tensor upper = at::ones({d, d});
        ASSERT_TRUE(add_gram(upper, x, weights));
        const at::Tensor expected = at::triu(literal(x, weights) + 1.0);
        EXPECT_LT(((at::triu(upper) - expected).norm() / expected.norm()).item<double>(), kSumTolerance)
            << d << " " << n;
      }
    }
}

TEST(Gram, AddsProductsOfTwoMatrices) {
  at::manual_seed(6);
  for (const int64_t d : {3, 48, 130}) {
    const at::Tensor a = at::randn({300, d}).to(at::kBFloat16), b = at::randn({300, d}).to(at::kBFloat16);
    if (!has_gram(a)) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
    at::Tensor sum = at::ones({d, d});
    ASSERT_TRUE(add_product(sum, a, b));
    const at::Tensor expected = a.to(at::kDouble).t().mm(b.to(at::kDouble)) + 1.0;
    EXPECT_LT(((sum - expected).norm() / expected.norm()).item<double>(), kSumTolerance) << d;
  }
}

TEST(Gram, GivesTheSameBitsOnOneAndThreeThreads) {
  at::manual_seed(5);
  const at::Tensor x = at::randn({300, 250}).to(at::kBFloat16);
  if (!has_gram(x)) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
  at::Tensor one = at::zeros({250, 250}), three = at::zeros({250, 250});
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  ASSERT_TRUE(add_gram(one, x, {}));
  at::set_num_threads(3);
  ASSERT_TRUE(add_gram(three, x, {}));
  at::set_num_threads(before);
  EXPECT_TRUE(at::equal(one, three));
}

TEST(Gram, RefusesWhatIsNotFiniteAndLeavesTheSumAlone) {
  at::Tensor x = at::ones({9, 60}).to(at::kBFloat16);
  if (!has_gram(x)) GTEST_SKIP() << "no AVX-512 BF16 on this machine";
  x[7][50] = std::numeric_limits<float>::infinity();
  at::Tensor upper = at::zeros({60, 60}), roots = at::ones({9});
  EXPECT_FALSE(add_gram(upper, x, {}));
  EXPECT_FALSE(add_gram(upper, x, roots));
  EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
  roots[7] = 0;  // a row without weight may hold anything
  EXPECT_TRUE(add_gram(upper, x, roots));
  EXPECT_EQ(upper[0][0].item<float>(), 8.0F);
}

}  // namespace
}  // namespace isobath::kernels
