#include <gtest/gtest.h>
#include <isobath/core/error.hpp>
#include <isobath/sensitivity/recording_linear.hpp>

namespace isobath::sensitivity {
namespace {

struct Recorded {
  std::vector<at::Tensor> x, gradient;
  OnBackward callback() {
    return [this](const at::Tensor& input, const at::Tensor& output_gradient) {
      x.push_back(input);
      gradient.push_back(output_gradient);
    };
  }
};

struct Operands {
  at::Tensor x, weight, bias, gradient;
  explicit Operands(at::ScalarType dtype) {
    at::manual_seed(3);
    x = at::randn({2, 5, 6}).to(dtype).requires_grad_();
    weight = at::randn({4, 6}).to(dtype);
    bias = at::randn({4}).to(dtype);
    gradient = at::randn({2, 5, 4}).to(dtype);
  }
};

TEST(RecordingLinear, ComputesTheLinearAndItsInputGradientAndReportsBoth) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Operands o(dtype);
    Recorded recorded;
    const at::Tensor y = recording_linear(o.x, o.weight, o.bias, recorded.callback());
    EXPECT_TRUE(at::equal(y.detach(), at::linear(o.x.detach(), o.weight, o.bias)));
    EXPECT_TRUE(recorded.x.empty()) << "the callback belongs to the backward pass";
    y.backward(o.gradient);
    ASSERT_EQ(recorded.x.size(), 1U);
    EXPECT_TRUE(at::equal(recorded.x[0], o.x.detach()));
    EXPECT_TRUE(at::equal(recorded.gradient[0], o.gradient));
    EXPECT_EQ(recorded.gradient[0].scalar_type(), dtype);
    EXPECT_FALSE(recorded.x[0].requires_grad());

    const at::Tensor x = o.x.detach().clone().requires_grad_();
    at::linear(x, o.weight, o.bias).backward(o.gradient);
    EXPECT_TRUE(at::equal(o.x.grad(), x.grad())) << "same product as autograd's own";
  }
}

TEST(RecordingLinear, WorksWithoutBias) {
  const Operands o(at::kFloat);
  Recorded recorded;
  const at::Tensor y = recording_linear(o.x, o.weight, {}, recorded.callback());
  EXPECT_TRUE(at::equal(y.detach(), at::linear(o.x.detach(), o.weight)));
  y.backward(o.gradient);
  EXPECT_EQ(recorded.x.size(), 1U);
}

TEST(RecordingLinear, NeverComputesAWeightGradient) {
  Operands o(at::kFloat);
  o.weight.requires_grad_();
  Recorded recorded;
  recording_linear(o.x, o.weight, o.bias, recorded.callback()).backward(o.gradient);
  EXPECT_FALSE(o.weight.grad().defined());
}

TEST(RecordingLinear, RunsBackwardSeveralTimesOnOneGraph) {
  const Operands o(at::kFloat);
  Recorded recorded;
  const at::Tensor y = recording_linear(o.x, o.weight, {}, recorded.callback());
  y.backward(o.gradient, /*retain_graph=*/true);
  y.backward(2 * o.gradient);
  ASSERT_EQ(recorded.x.size(), 2U);
  EXPECT_TRUE(at::equal(recorded.gradient[1], 2 * o.gradient));
  EXPECT_TRUE(at::equal(recorded.x[0], recorded.x[1]));
}

TEST(RecordingLinear, PassesThroughLaterOperations) {
  const Operands o(at::kFloat);
  Recorded first, second;
  const at::Tensor square = at::eye(4);
  const at::Tensor hidden = recording_linear(o.x, o.weight, {}, first.callback()).tanh();
  recording_linear(hidden, square, {}, second.callback()).backward(o.gradient);
  ASSERT_EQ(first.x.size(), 1U);
  const at::Tensor expected = o.gradient * (1 - hidden.detach().square());
  EXPECT_TRUE(at::allclose(first.gradient[0], expected));
  EXPECT_TRUE(at::equal(second.x[0], hidden.detach()));
}

TEST(RecordingLinear, KeepsTheTypeOfAnErrorOfItsCallback) {
  const Operands o(at::kFloat);
  const at::Tensor y = recording_linear(o.x, o.weight, {}, [](const at::Tensor&, const at::Tensor&) {
    fail<NumericError>("gradient of sequence 7 is not finite");
  });
  EXPECT_THROW(y.backward(o.gradient), NumericError);
}

}  // namespace
}  // namespace isobath::sensitivity
