#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <isobath/kernels/elementwise.hpp>

namespace isobath::kernels {
namespace {

// f32 against autograd: sums of some hundred terms in two orders. bf16 against f32: a few roundings of 2⁻⁹.
constexpr double kSingleTolerance = 2e-6, kBf16Tolerance = 6e-3;
constexpr double kEps = 1e-5;

double relative(const at::Tensor& found, const at::Tensor& expected) {
  return ((found.to(at::kFloat) - expected).norm() / expected.norm()).item<double>();
}

class Elementwise : public ::testing::TestWithParam<std::tuple<at::ScalarType, int64_t>> {
 protected:
  [[nodiscard]] at::ScalarType dtype() const { return std::get<0>(GetParam()); }
  [[nodiscard]] double tolerance() const { return dtype() == at::kFloat ? kSingleTolerance : kBf16Tolerance; }
  [[nodiscard]] at::Tensor random(at::IntArrayRef shape) const { return at::randn(shape).to(dtype()); }
};

TEST_P(Elementwise, NormAgreesWithTheFormulaAndAutograd) {
  const int64_t d = std::get<1>(GetParam());
  at::manual_seed(11);
  const at::Tensor x = random({3, 5, d}), weight = random({d}), gradient = random({3, 5, d}),
                   rest = random({3, 5, d});
  const at::Tensor leaf = x.to(at::kFloat).requires_grad_();
  const at::Tensor expected = leaf / (leaf.square().mean(-1, true) + kEps).sqrt() * weight.to(at::kFloat);
  const at::Tensor expected_gradient =
      torch::autograd::grad({expected}, {leaf}, {gradient.to(at::kFloat)})[0];
  EXPECT_LT(relative(rms_norm(x, weight, kEps), expected.detach()), tolerance());
  EXPECT_LT(relative(rms_norm_backward(x, weight, kEps, gradient, {}), expected_gradient), tolerance());
  EXPECT_LT(
      relative(rms_norm_backward(x, weight, kEps, gradient, rest), expected_gradient + rest.to(at::kFloat)),
      tolerance());
  EXPECT_EQ(rms_norm(x, weight, kEps).scalar_type(), dtype());
}

TEST_P(Elementwise, GateAgreesWithTheFormulaAndAutograd) {
  const int64_t d = std::get<1>(GetParam());
  at::manual_seed(12);
  const at::Tensor gate = random({2, 3, d}) * 4, up = random({2, 3, d}), gradient = random({2, 3, d});
  const at::Tensor gate_leaf = gate.to(at::kFloat).requires_grad_(),
                   up_leaf = up.to(at::kFloat).requires_grad_();
  const at::Tensor expected = gate_leaf / (1 + (-gate_leaf).exp()) * up_leaf;
  const auto expected_gradients =
      torch::autograd::grad({expected}, {gate_leaf, up_leaf}, {gradient.to(at::kFloat)});
  const GatedGradients found = gated_backward(gate, up, gradient);
  EXPECT_LT(relative(gated(gate, up), expected.detach()), tolerance());
  EXPECT_LT(relative(found.gate, expected_gradients[0]), tolerance());
  EXPECT_LT(relative(found.up, expected_gradients[1]), tolerance());
}

// Widths below, at and beyond the vector length.
INSTANTIATE_TEST_SUITE_P(Shapes, Elementwise,
                         ::testing::Combine(::testing::Values(at::kFloat, at::kBFloat16),
                                            ::testing::Values(3, 16, 33, 576)));

TEST(ElementwiseRange, TheGateIsFlatFarOut) {
  const at::Tensor gate = at::tensor({-1e30F, -200.0F, 0.0F, 200.0F}).to(at::kBFloat16),
                   one = at::ones_like(gate);
  const at::Tensor y = gated(gate, one).to(at::kFloat);
  EXPECT_TRUE(at::equal(y, at::tensor({0.0F, 0.0F, 0.0F, 200.0F}))) << y;
  const GatedGradients g = gated_backward(gate, one, one);
  EXPECT_TRUE(at::equal(g.gate.to(at::kFloat), at::tensor({0.0F, 0.0F, 0.5F, 1.0F}))) << g.gate;
}

}  // namespace
}  // namespace isobath::kernels
