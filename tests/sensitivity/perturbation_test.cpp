#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/sensitivity/perturbation.hpp>
#include <limits>

namespace isobath::sensitivity {
namespace {

// f32 products of a few hundred terms.
constexpr double kF32 = 1e-4;
// A GᵀX rounded to bf16 has independent errors of 2⁻⁹; s adds up some 10⁴ of its entries.
constexpr double kBf16 = 2e-2;

struct Case {
  at::Tensor x, gradient, mask, token_weights, delta;

  /// More rows than a tile, and padding that holds NaN.
  static Case make(at::ScalarType dtype) {
    at::manual_seed(7);
    Case c{at::randn({2, 24, 20}).to(dtype), at::randn({2, 24, 600}).to(dtype), at::ones({2, 24}, at::kBool),
           at::rand({2, 24}), 0.1 * at::randn({3, 600, 20})};
    // The gradients follow the perturbations, as they do in a model: s would else be a sum of nothing but
    // noise.
    c.gradient = (c.gradient + at::matmul(c.x.to(at::kFloat), c.delta[0].t())).to(dtype);
    c.mask[1].slice(0, 18, 24).fill_(false);
    c.token_weights[1].slice(0, 18, 24).fill_(0);
    c.x[1].slice(0, 18, 24).fill_(std::numeric_limits<float>::quiet_NaN());
    c.gradient[1].slice(0, 18, 24).fill_(0);
    return c;
  }
  [[nodiscard]] PerturbationScores scores(const ProbeKey& key) const {
    return perturbation_scores(
        x, gradient, mask, token_weights, delta.size(0),
        [this](int64_t k, Range rows) { return delta[k].slice(0, rows.begin, rows.end); }, key);
  }
};

double relative_error(const at::Tensor& found, const at::Tensor& expected) {
  return ((found - expected).abs().max() / expected.abs().max()).item<double>();
}

TEST(PerturbationScores, AgreeWithTheWholeProductsInF64) {
  for (const auto& [dtype, tolerance] : {std::pair{at::kFloat, kF32}, std::pair{at::kBFloat16, kBf16}}) {
    const Case c = Case::make(dtype);
    const PerturbationScores expected =
        perturbation_scores_reference(c.x, c.gradient, c.mask, c.token_weights, c.delta);

    const PerturbationScores found = c.scores({.n_probes = 2});

    EXPECT_LT(relative_error(found.first_order, expected.first_order), tolerance) << dtype;
    EXPECT_LT(relative_error(found.gradient_norm, expected.gradient_norm), tolerance) << dtype;
  }
}

TEST(PerturbationScores, ProbesEstimateTheOutputChange) {
  // 24 tokens x 1024 probes: the estimate's relative deviation is below sqrt(2 / 1024).
  constexpr double kTolerance = 0.1;
  const Case c = Case::make(at::kFloat);
  const PerturbationScores expected =
      perturbation_scores_reference(c.x, c.gradient, c.mask, c.token_weights, c.delta);

  const PerturbationScores found = c.scores({.n_probes = 1024, .seed = 3});

  EXPECT_LT(relative_error(found.output_change, expected.output_change), kTolerance);
  EXPECT_LT(relative_error(found.weighted_change, expected.weighted_change), kTolerance);
}

TEST(PerturbationScores, ASequenceGivesTheSameBitsAloneAndInAMicrobatch) {
  const Case c = Case::make(at::kFloat);
  const PerturbationScores together = c.scores({.first_sequence = 5, .n_probes = 3, .seed = 9});
  for (int64_t s = 0; s < 2; ++s) {
    const Case one{c.x.slice(0, s, s + 1), c.gradient.slice(0, s, s + 1), c.mask.slice(0, s, s + 1),
                   c.token_weights.slice(0, s, s + 1), c.delta};
    const PerturbationScores alone = one.scores({.first_sequence = 5 + s, .n_probes = 3, .seed = 9});
    EXPECT_TRUE(at::equal(alone.first_order[0], together.first_order[s]));
    EXPECT_TRUE(at::equal(alone.output_change[0], together.output_change[s]));
    EXPECT_TRUE(at::equal(alone.weighted_change[0], together.weighted_change[s]));
    EXPECT_TRUE(at::equal(alone.gradient_norm[0], together.gradient_norm[s]));
  }
}

TEST(PerturbationScores, ANonFiniteScoreIsAnError) {
  Case c = Case::make(at::kFloat);
  c.gradient[0][3][4] = std::numeric_limits<float>::infinity();
  EXPECT_THROW((void)c.scores({}), NumericError);
}

}  // namespace
}  // namespace isobath::sensitivity
