#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <isobath/kernels/linear.hpp>
#include <mutex>
#include <set>
#include <thread>

namespace isobath::kernels {
namespace {

// f32 sums of up to some thousand products against f64.
constexpr double kSumTolerance = 2e-6;

double relative(const at::Tensor& found, const at::Tensor& expected) {
  return ((found.to(at::kDouble) - expected).norm() / expected.norm()).item<double>();
}

struct Case {
  int64_t n, d_in, d_out;
};

class Linear : public ::testing::TestWithParam<Case> {};

TEST_P(Linear, AgreesWithTheProductInF64) {
  const Case c = GetParam();
  at::manual_seed(21);
  const at::Tensor x = at::randn({1, c.n, c.d_in}), bias = at::randn({c.d_out}),
                   gradient = at::randn({1, c.n, c.d_out}), rest = at::randn({1, c.n, c.d_in});
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor weight = at::randn({c.d_out, c.d_in}).to(dtype), wide = weight.to(at::kDouble);
    const at::Tensor product = at::matmul(x.to(at::kDouble), wide.t());
    const at::Tensor through = at::matmul(gradient.to(at::kDouble), wide);
    EXPECT_LT(relative(linear_forward(x, weight, {}), product), kSumTolerance);
    EXPECT_LT(relative(linear_forward(x, weight, bias), product + bias.to(at::kDouble)), kSumTolerance);
    EXPECT_LT(relative(linear_backward(gradient, weight), through), kSumTolerance);
    at::Tensor sum = rest.clone();
    add_linear_backward(sum, gradient, weight);
    EXPECT_LT(relative(sum, through + rest.to(at::kDouble)), kSumTolerance);
  }
}

// Around the tile (4 x 24), the panel (24), the block (96) and the pass (256); 9000 rows take several chunks.
INSTANTIATE_TEST_SUITE_P(Shapes, Linear,
                         ::testing::Values(Case{1, 1, 1}, Case{3, 7, 5}, Case{4, 8, 24}, Case{25, 257, 97},
                                           Case{96, 256, 96}, Case{70, 600, 200}, Case{9000, 513, 30}));

TEST(LinearWeights, GiveTheSameBitsInBf16AndWidened) {
  at::manual_seed(22);
  const at::Tensor x = at::randn({50, 300}), weight = at::randn({70, 300}).to(at::kBFloat16);
  EXPECT_TRUE(at::equal(linear_forward(x, weight, {}), linear_forward(x, weight.to(at::kFloat), {})));
  const at::Tensor gradient = at::randn({50, 70});
  EXPECT_TRUE(at::equal(linear_backward(gradient, weight), linear_backward(gradient, weight.to(at::kFloat))));
}

// Many blocks of columns, and so few that rows are cut as well.
TEST(LinearThreads, GiveTheSameBitsOnOneAndThreeThreads) {
  at::manual_seed(23);
  const int before = at::get_num_threads();
  for (const auto& [n, d_out] : {std::pair{100, 300}, std::pair{1000, 70}}) {
    const at::Tensor x = at::randn({n, 700}), weight = at::randn({d_out, 700}),
                     gradient = at::randn({n, d_out});
    at::set_num_threads(1);
    const at::Tensor one = linear_forward(x, weight, {}), back = linear_backward(gradient, weight);
    at::set_num_threads(3);
    EXPECT_TRUE(at::equal(linear_forward(x, weight, {}), one)) << n;
    EXPECT_TRUE(at::equal(linear_backward(gradient, weight), back)) << n;
    at::set_num_threads(before);
  }
}

// at::parallel_for is a header: compiled without OpenMP, or against another runtime than the one whose
// threads at::set_num_threads sets, it would be a plain loop, and a rank of many threads as slow as one of
// one.
TEST(LinearThreads, AreAsManyAsTheRankWasGiven) {
  const int before = at::get_num_threads();
  at::set_num_threads(3);
  std::mutex mutex;
  std::set<std::thread::id> threads;
  int64_t n_parts = 0;
  at::parallel_for(0, 3, 1, [&](int64_t, int64_t) {
    const std::scoped_lock lock(mutex);
    threads.insert(std::this_thread::get_id());
    ++n_parts;
  });
  at::set_num_threads(before);
  EXPECT_EQ(n_parts, 3);
  EXPECT_EQ(threads.size(), 3U);
}

}  // namespace
}  // namespace isobath::kernels
