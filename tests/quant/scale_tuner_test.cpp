#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/quant/scale_tuner.hpp>
#include <isobath/quant/solver.hpp>
#include <limits>

#include "quant/problem.hpp"

namespace isobath::quant {

// f32 against f64.
constexpr double kTolerance = 1e-5;
constexpr int64_t kRows = 5, kColumns = 24, kGroup = 8;

static QuantizedMatrix random_matrix(bool symmetric, at::ScalarType storage, uint64_t seed) {
  auto generator = test_generator(seed);
  const at::Tensor w = at::randn({kRows, kColumns}, generator) + 0.3;
  return round_to_nearest(w, {}, {.bits = 3, .group = kGroup, .symmetric = symmetric, .storage = storage});
}

TEST(ScaleGradient, IsTheDerivativeOfALossOfTheWeights) {
  for (const bool symmetric : {true, false}) {
    QuantizedMatrix matrix = random_matrix(symmetric, at::kFloat, 51);
    auto generator = test_generator(52);
    const at::Tensor wanted = at::randn({kRows, kColumns}, generator);
    // L = ½ ‖W − wanted‖² is quadratic in a scale: central differences are exact but for rounding.
    const auto loss = [&](const QuantizedMatrix& of) {
      const at::Tensor levels =
          (of.codes.to(at::kDouble).view({kRows, -1, kGroup}) - of.zero.to(at::kDouble).unsqueeze(2));
      const at::Tensor w = (levels * of.scale.to(at::kDouble).unsqueeze(2)).view({kRows, kColumns});
      return 0.5 * (w - wanted.to(at::kDouble)).square().sum().item<double>();
    };
    const at::Tensor gradient = scale_gradient(dequantize(matrix) - wanted, matrix);
    ASSERT_EQ(gradient.sizes(), matrix.scale.sizes());
    constexpr double kStep = 1.0 / 1024;
    for (int64_t row = 0; row < kRows; ++row)
      for (int64_t group = 0; group < kColumns / kGroup; ++group) {
        QuantizedMatrix more = matrix, less = matrix;
        more.scale = matrix.scale.to(at::kDouble);
        less.scale = matrix.scale.to(at::kDouble);
        more.scale[row][group] += kStep;
        less.scale[row][group] -= kStep;
        const double expected = (loss(more) - loss(less)) / (2 * kStep);
        EXPECT_NEAR(gradient[row][group].item<double>(), expected, kTolerance * (1 + std::abs(expected)));
      }
  }
}

TEST(ShareOfRate, IsWholeUpToThreeBitsAndHalvedForEachBitMore) {
  for (const auto& [bits, expected] : {std::pair{2, 1.0}, {3, 1.0}, {4, 0.5}, {5, 0.25}, {8, 1.0 / 32}})
    EXPECT_EQ(share_of_rate({.bits = bits, .group = kGroup}), expected) << bits;
}

TEST(ScaleTuner, TakesStepsOfAdamOnTheLogarithm) {
  const QuantizedMatrix matrix = random_matrix(true, at::kFloat, 53);
  ScaleTuner tuner(matrix);
  // By hand, for one scale.
  const double first = matrix.scale[2][1].item<double>();
  double t = 0, mean = 0, square = 0;
  const std::vector<double> gradients{0.8, -0.3, 0.5}, rates{0.01, 0.02, 0.005};
  for (size_t i = 0; i < gradients.size(); ++i) {
    tuner.step(at::full_like(matrix.scale, gradients[i]), rates[i]);
    const double g = gradients[i] * first * std::exp(t), n = static_cast<double>(i + 1);
    mean = 0.9 * mean + 0.1 * g;
    square = 0.95 * square + 0.05 * g * g;
    t -= rates[i] * (mean / (1 - std::pow(0.9, n))) / (std::sqrt(square / (1 - std::pow(0.95, n))) + 1e-8);
    EXPECT_NEAR(tuner.matrix().scale[2][1].item<double>() / (first * std::exp(t)), 1, kTolerance);
  }
  EXPECT_TRUE(at::equal(tuner.matrix().codes, matrix.codes));
}

TEST(ScaleTuner, FirstStepIsTheRateWhateverTheSizeOfTheGradient) {
  const QuantizedMatrix matrix = random_matrix(true, at::kFloat, 54);
  for (const double size : {1e-3, 1e3}) {
    ScaleTuner tuner(matrix);
    tuner.step(at::full_like(matrix.scale, size), 0.01);
    EXPECT_TRUE(at::allclose(tuner.matrix().scale, matrix.scale * std::exp(-0.01), 1e-4, 0)) << size;
  }
}

TEST(ScaleTuner, ApproachesTheScalesOfAKnownOptimum) {
  const QuantizedMatrix start = random_matrix(true, at::kFloat, 55);
  // The optimum: the same codes with other scales.
  QuantizedMatrix optimum = start;
  auto generator = test_generator(56);
  optimum.scale = start.scale * (1 + 0.1 * at::randn(start.scale.sizes(), generator)).clamp_min(0.5);
  const at::Tensor wanted = dequantize(optimum);
  ScaleTuner tuner(start);
  const auto distance = [&] { return (dequantize(tuner.matrix()) - wanted).square().sum().item<double>(); };
  const double before = distance();
  constexpr int kSteps = 200;
  for (int i = 0; i < kSteps; ++i)
    tuner.step(scale_gradient(dequantize(tuner.matrix()) - wanted, tuner.matrix()),
               0.02 * (1 - i / double{kSteps}));
  EXPECT_LT(distance(), 1e-3 * before);
}

TEST(ScaleTuner, GoesOnFromASavedStateBitByBit) {
  const QuantizedMatrix matrix = random_matrix(true, at::kBFloat16, 58);
  auto generator = test_generator(59);
  ScaleTuner undisturbed(matrix), saved(matrix), resumed(matrix);
  const auto step = [&](auto... tuners) {
    const at::Tensor gradient = at::randn(matrix.scale.sizes(), generator);
    (tuners->step(gradient, 0.01), ...);
  };
  for (int i = 0; i < 3; ++i) step(&undisturbed, &saved);
  resumed.restore(saved.state(), 3);
  EXPECT_TRUE(at::equal(resumed.matrix().scale, undisturbed.matrix().scale));
  for (int i = 0; i < 3; ++i) step(&undisturbed, &resumed);
  EXPECT_TRUE(at::equal(resumed.matrix().scale, undisturbed.matrix().scale));
  EXPECT_TRUE(at::equal(resumed.state(), undisturbed.state()));
  EXPECT_THROW(resumed.restore(saved.state().slice(1, 1), 3), CheckpointError);
  EXPECT_THROW(resumed.restore(saved.state().to(at::kDouble), 3), CheckpointError);
}

TEST(ScaleTuner, StoresWhatALoaderReadsAndRefusesWhatIsNotFinite) {
  ScaleTuner tuner(random_matrix(false, at::kBFloat16, 57));
  tuner.step(at::ones(tuner.matrix().scale.sizes()), 0.01);
  EXPECT_EQ(tuner.matrix().scale.scalar_type(), at::kBFloat16);
  at::Tensor bad = at::ones(tuner.matrix().scale.sizes());
  bad[0][0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(tuner.step(bad, 0.01), NumericError);
}

}  // namespace isobath::quant
