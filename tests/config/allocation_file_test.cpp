#include <gtest/gtest.h>

#include <isobath/config/allocation_file.hpp>

#include "minimal.hpp"

namespace isobath::config {
namespace {

const std::string kUp = "model.layers.0.mlp.up_proj", kDown = "model.layers.0.mlp.down_proj";

RunConfig with(const std::string& text) {
  RunConfig config = parse(kMinimal, {}, "run.yaml");
  apply_allocation(config, text, "bits.yaml");
  return config;
}

std::string allocation_problem(const std::string& text) {
  try {
    (void)with(text);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(AllocationFile, GivesBackTheWidthsAndTheirProvenance) {
  const std::map<std::string, int> bits{{kUp, 2}, {kDown, 4}};
  const std::map<std::string, std::string> provenance{{"model", "0123"}, {"budget", "3 bits a weight: all"}};

  const Allocation found = with(allocation_text(bits, provenance)).quantization.allocated;

  EXPECT_EQ(found.bits, bits);
  EXPECT_EQ(found.provenance, provenance);
  EXPECT_NE(found.digest, with(allocation_text({{kUp, 3}}, provenance)).quantization.allocated.digest);
}

TEST(AllocationFile, ItsWidthsWinOverTheRunsAndOverridesWinOverThem) {
  RunConfig config = with(allocation_text({{kUp, 2}, {kDown, 4}}, {{"model", "m"}}));
  config.quantization.overrides = {{"re:.*down_proj", 8, -1}};

  EXPECT_EQ(choice_for(config.quantization, kUp).bits, 2);
  EXPECT_EQ(choice_for(config.quantization, kUp).group, 64);
  EXPECT_EQ(choice_for(config.quantization, kDown).bits, 8);
  EXPECT_EQ(choice_for(config.quantization, "model.layers.1.mlp.up_proj").bits, 3);
}

TEST(AllocationFile, AnythingElseIsRefusedWithItsName) {
  for (const auto& [text, mention] : std::vector<std::pair<std::string, std::string>>{
           {"", "allocation and overrides; found nothing"},
           {"[1]", "found a list"},
           {"model: m", "found other keys"},
           {"allocation: {a: b}\noverrides: []\nmore: 1", "found other keys"},
           {"allocation: {a: b}\noverrides: 3", "expected a list"},
           {"allocation: {a: b}\noverrides: [{match: m, bits: 7}]", "expected one of 2 | 3 | 4"},
           {"allocation: {a: b}\noverrides: [{match: m, group: 32}]", "without bits"},
           {"allocation: {a: b}\noverrides: [{match: 're:m', bits: 3}]", "whole module name"},
           {"allocation: {a: b}\noverrides: [{match: m, bits: 3}, {match: m, bits: 4}]",
            "\"m\" stands twice"},
           {"allocation: {", "not valid YAML"}}) {
    const std::string problem = allocation_problem(text);
    EXPECT_NE(problem.find(mention), std::string::npos) << text << " -> " << problem;
    EXPECT_NE(problem.find("bits.yaml"), std::string::npos) << problem;
  }
}

TEST(Widths, AreDistinctAndAscending) {
  EXPECT_EQ(parse(kMinimal, {"sensitivity.gram.bits=[2, 3, 8]"}, "run.yaml").sensitivity.gram_bits,
            (std::vector<int>{2, 3, 8}));
  EXPECT_NE(problem_of(kMinimal, {"sensitivity.gram.bits=[3, 2]"}).find("found 2 after 3"),
            std::string::npos);
  EXPECT_NE(problem_of(kMinimal, {"sensitivity.gram.bits=[3, 3]"}).find("found 3 after 3"),
            std::string::npos);
  EXPECT_EQ(
      parse(kMinimal, {"sensitivity.gram.bits=[2, 3]", "sensitivity.gram.checkpoints=[a, b]"}, "run.yaml")
          .sensitivity.gram_checkpoints,
      (std::vector<std::string>{"a", "b"}));
  EXPECT_NE(problem_of(kMinimal, {"sensitivity.gram.bits=[2, 3]", "sensitivity.gram.checkpoints=[a]"})
                .find("one a width of sensitivity.gram.bits, found 1 of 2"),
            std::string::npos);
  EXPECT_NE(problem_of(kMinimal, {"sensitivity.gram.checkpoints=a"}).find("a list of paths"),
            std::string::npos);
  EXPECT_NE(problem_of(kMinimal, {"sensitivity.gram.bits=4"}).find("expected a list of widths"),
            std::string::npos);
}

}  // namespace
}  // namespace isobath::config
