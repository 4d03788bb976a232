// Against what transformers computed in f32 (tests/data/make_tiny_golden.py; versions in the golden files'
// metadata).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/io/safetensors_reader.hpp>
#include <isobath/model/block.hpp>

#include "model/gradient_probe.hpp"

namespace isobath::model {
namespace {

// The same f32 operations in the same library: only the order of sums inside a product may differ between
// builds.
constexpr double kMaxLogitsError = 1e-4;
constexpr double kMaxGradientError = 1e-3;
constexpr double kMaxLossError = 1e-6;
// bf16 keeps 8 bits: 0.4 % a rounding, some dozen roundings along the way.
constexpr double kMaxBf16LogitsError = 0.05;

double max_relative_error(const at::Tensor& found, const at::Tensor& expected) {
  return ((found - expected).abs().max() / expected.abs().max()).item<double>();
}

double relative_distance(const at::Tensor& found, const at::Tensor& expected) {
  return ((found - expected).norm() / expected.norm()).item<double>();
}

class TinyModel : public testing::TestWithParam<std::string> {
 protected:
  std::filesystem::path directory_ = std::filesystem::path(ISOBATH_TEST_DATA) / ("tiny_" + GetParam());
  CheckpointReader checkpoint_{directory_};
  io::SafetensorsReader golden_{directory_ / "golden.safetensors"};
};

TEST_P(TinyModel, LogitsAndLossEqualTransformers) {
  const Probe probe = probe_gradients(checkpoint_, golden_.read("tokens"), at::kFloat);

  EXPECT_LE(max_relative_error(probe.logits, golden_.read("logits")), kMaxLogitsError);
  const double expected = golden_.read("nll_sum").item<double>();
  EXPECT_NEAR(probe.nll_sum, expected, kMaxLossError * expected);
}

TEST_P(TinyModel, GradientsAtEveryLinearEqualTransformers) {
  const Probe probe = probe_gradients(checkpoint_, golden_.read("tokens"), at::kFloat);

  EXPECT_EQ(static_cast<int64_t>(probe.gradients.size()), checkpoint_.config().n_blocks * kProjections + 1);
  for (const auto& [name, gradient] : probe.gradients) {
    EXPECT_LE(relative_distance(gradient, golden_.read("gradient." + name)), kMaxGradientError) << name;
  }
}

TEST_P(TinyModel, Bf16StaysNearF32) {
  const Probe probe = probe_gradients(checkpoint_, golden_.read("tokens"), at::kBFloat16);

  EXPECT_LE(max_relative_error(probe.logits, golden_.read("logits")), kMaxBf16LogitsError);
  EXPECT_EQ(probe.gradients.at("hidden").scalar_type(), at::kBFloat16);
}

TEST_P(TinyModel, RotaryAnglesEqualTransformersBitForBit) {
  constexpr int64_t kLength = 7;
  const Rotary rotary = Rotary::make(checkpoint_.config(), kLength, at::kCPU);

  const at::Tensor frequencies = golden_.read("frequencies");
  const at::Tensor angles = at::arange(kLength, at::kFloat).unsqueeze(1) * frequencies.unsqueeze(0);
  EXPECT_TRUE(at::equal(rotary.cos, at::cat({angles, angles}, 1).cos()));
  EXPECT_TRUE(at::equal(rotary.sin, at::cat({angles, angles}, 1).sin()));
}

INSTANTIATE_TEST_SUITE_P(Variants, TinyModel,
                         testing::Values("llama_a", "llama_b", "mistral", "qwen2", "qwen3"),
                         [](const auto& variant) { return variant.param; });

}  // namespace
}  // namespace isobath::model
