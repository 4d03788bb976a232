#include <gtest/gtest.h>

#include "minimal.hpp"

namespace isobath::config {
namespace {

TEST(ModuleChoice, WithoutOverridesAModuleTakesTheRunsBitsAndGroup) {
  const Quantization quantization;
  const ModuleChoice choice = choice_for(quantization, "model.layers.0.mlp.up_proj");

  EXPECT_TRUE(choice.quantized);
  EXPECT_EQ(choice.bits, 3);
  EXPECT_EQ(choice.group, 64);
}

TEST(ModuleChoice, ALaterOverrideWinsFieldByField) {
  Quantization quantization;
  quantization.overrides = {
      {"re:.*_proj", 4, 32}, {"re:.*\\.down_proj$", 5, -1}, {"model.layers.1.mlp.down_proj", 0, 0}};

  EXPECT_EQ(choice_for(quantization, "model.layers.0.mlp.up_proj").bits, 4);
  EXPECT_EQ(choice_for(quantization, "model.layers.0.mlp.down_proj").bits, 5);
  EXPECT_EQ(choice_for(quantization, "model.layers.0.mlp.down_proj").group, 32);
  EXPECT_EQ(choice_for(quantization, "model.layers.1.mlp.down_proj").bits, 5);
  EXPECT_EQ(choice_for(quantization, "model.layers.1.mlp.down_proj").group, 0);
}

TEST(ModuleChoice, IgnoreWinsOverOverrides) {
  Quantization quantization;
  quantization.overrides = {{"lm_head", 8, -1}};

  EXPECT_FALSE(choice_for(quantization, "lm_head").quantized);
}

TEST(ModuleChoice, PatternsMatchFromTheStartAndNamesWhole) {
  Quantization quantization;
  quantization.ignore = {"lm_head", "re:model\\.layers\\.1\\.", "up_proj"};

  EXPECT_FALSE(choice_for(quantization, "model.layers.1.mlp.up_proj").quantized);
  EXPECT_TRUE(choice_for(quantization, "model.layers.11.mlp.up_proj").quantized);
  EXPECT_TRUE(choice_for(quantization, "x.model.layers.1.mlp.up_proj").quantized);
  EXPECT_TRUE(choice_for(quantization, "lm_head.0").quantized);
}

TEST(ModuleChoice, ABrokenPatternIsFoundWhenTheConfigurationIsRead) {
  const std::string problem = problem_of(kMinimal, {"quantization.ignore=['re:(']"});

  EXPECT_NE(problem.find("expected a regular expression after \"re:\", found \"re:(\""), std::string::npos)
      << problem;
}

}  // namespace
}  // namespace isobath::config
