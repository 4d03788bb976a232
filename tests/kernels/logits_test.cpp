#include <gtest/gtest.h>

#include <isobath/kernels/logits.hpp>
#include <limits>

namespace isobath::kernels {
namespace {

// f32 sums over some thousand probabilities against f64; probabilities are rounded to the logits' dtype.
constexpr double kSumTolerance = 2e-5, kBf16Tolerance = 4e-3;

class Logits : public ::testing::TestWithParam<std::tuple<at::ScalarType, int64_t>> {};

TEST_P(Logits, AgreeWithTheFormulasInF64) {
  const auto [dtype, vocab] = GetParam();
  at::manual_seed(8);
  const at::Tensor p = (at::randn({5, vocab}) * 6).to(dtype),
                   q = (p.to(at::kFloat) + at::randn({5, vocab})).to(dtype);
  const at::Tensor labels = at::randint(vocab, {5}, at::kLong);
  const at::Tensor log_p = p.to(at::kDouble).log_softmax(1), log_q = q.to(at::kDouble).log_softmax(1);
  const auto nll = [&](const at::Tensor& log) { return log.gather(1, labels.unsqueeze(1)).squeeze(1).neg(); };
  const auto near = [](const at::Tensor& a, const at::Tensor& b, double tolerance) {
    return at::allclose(a.to(at::kDouble), b, tolerance, tolerance);
  };

  const LabelLoss loss = label_loss(p, labels);
  EXPECT_TRUE(near(loss.nll, nll(log_p), kSumTolerance));
  EXPECT_TRUE(near(loss.probabilities, log_p.exp(), kBf16Tolerance));
  EXPECT_EQ(loss.probabilities.scalar_type(), dtype);

  const Comparison found = compare_logits(p, q, labels);
  EXPECT_TRUE(near(found.nll_p, nll(log_p), kSumTolerance));
  EXPECT_TRUE(near(found.nll_q, nll(log_q), kSumTolerance));
  EXPECT_TRUE(near(found.kl, (log_p.exp() * (log_p - log_q)).sum(1), kSumTolerance));
  EXPECT_TRUE(at::equal(found.same_top1, (p.argmax(1) == q.argmax(1)).to(at::kByte)));
}

INSTANTIATE_TEST_SUITE_P(Vocabularies, Logits,
                         ::testing::Combine(::testing::Values(at::kFloat, at::kBFloat16),
                                            ::testing::Values(2, 16, 31, 5003)));

TEST(LogitsRange, EqualPredictionsDivergeByNothingAndNaNIsNotHidden) {
  at::Tensor p = at::full({2, 40}, 50.0).to(at::kBFloat16);
  const at::Tensor labels = at::zeros({2}, at::kLong);
  const Comparison same = compare_logits(p, p, labels);
  EXPECT_EQ(same.kl.abs().max().item<float>(), 0.0F);
  EXPECT_NEAR(same.nll_p[0].item<float>(), std::log(40.0F), 1e-5F);
  at::Tensor bad = p.clone();
  bad[1][7] = std::numeric_limits<float>::quiet_NaN();
  const Comparison broken = compare_logits(p, bad, labels);
  EXPECT_TRUE(std::isfinite(broken.nll_q[0].item<float>()));
  EXPECT_FALSE(std::isfinite(broken.nll_q[1].item<float>()));
  EXPECT_FALSE(std::isfinite(label_loss(bad, labels).nll[1].item<float>()));
}

}  // namespace
}  // namespace isobath::kernels
