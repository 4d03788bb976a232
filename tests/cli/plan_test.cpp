#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <isobath/cli/plan.hpp>
#include <isobath/core/error.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;

const std::string kRoot = ISOBATH_SOURCE_ROOT;

config::RunConfig large_config() {
  config::RunConfig config;
  config.model = "models/not-here";
  config.calibration = {
      .tokens = {}, .sequences = 128, .length = 2048, .microbatch = 1, .logical_shards = 128};
  config.evaluation.tokens = "test.safetensors";
  config.quantization.reestimate = {.policy = "every", .blocks = 8};
  return config;
}

PlanRequest request(const std::string& model, const std::string& cluster) {
  return {.cluster = kRoot + "/configs/clusters/" + cluster + ".yaml",
          .model_config = kRoot + "/configs/models/" + model + "/config.json"};
}

std::string problem_of(const config::RunConfig& config, const PlanRequest& asked) {
  try {
    (void)plan_run(config, asked);
  } catch (const Error& error) {
    return fmt::format("{} {}", static_cast<int>(error.code()), error.what());
  }
  return "accepted";
}

TEST(PlanCommand, TextAndJsonTellTheSame) {
  const config::RunConfig config = large_config();
  const plan::Plan plan = plan_run(config, request("llama-3.1-8b", "h100-node"));
  const auto json = nlohmann::json::parse(plan_json(config, plan));
  const std::string text =
      plan_text(config, plan, {.path = "my config.yaml", .settings = {"plan.cluster=c"}});

  EXPECT_EQ(json["ranks"], 8);
  EXPECT_EQ(json["stages"].get<int>() * json["replicas"].get<int>(), 8);
  EXPECT_NE(text.find(fmt::format("  mpirun -n 8 isobath run 'my config.yaml' --set plan.cluster=c --set "
                                  "ranks.stages={} --set ranks.replicas={} --set residency=resident",
                                  json["stages"].get<int>(), json["replicas"].get<int>())),
            std::string::npos)
      << text;
  double sum = json["load"]["seconds"].get<double>() + json["measure"]["seconds"].get<double>() +
               json["evaluate"]["seconds"].get<double>();
  for (const auto& policy : json["quantize"])
    if (policy["configured"].get<bool>()) sum += policy["seconds"].get<double>();
  EXPECT_DOUBLE_EQ(sum, json["seconds"].get<double>());
  EXPECT_EQ(json["quantize"].size(), 3U);
  for (const char* row :
       {"load", "measure", "re-estimation every 8 blocks (configured)", "re-estimation never",
        "re-estimation every block", "evaluate", "the run as configured", "in flight", "hidden states",
        "H, factors and rows", "weights of both models"})
    EXPECT_NE(text.find(row), std::string::npos) << row << "\n" << text;
  EXPECT_EQ(json["memory"]["measure"].size(), json["stages"].get<size_t>());
  EXPECT_EQ(json["memory"]["reestimation"].size(), json["stages"].get<size_t>());
  EXPECT_EQ(json["disk"]["scratch_bytes_per_node"], 0);
}

/// The lines of `text` that hold `word`.
std::vector<std::string> lines_with(const std::string& text, const std::string& word) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);)
    if (line.find(word) != std::string::npos) lines.push_back(line);
  return lines;
}

TEST(PlanCommand, TextBeginsWithWhatMatters) {
  const config::RunConfig config = large_config();
  const plan::Plan plan = plan_run(config, request("llama-3.1-8b", "h100-node"));
  const std::string text = plan_text(config, plan, {.path = "c.yaml"});
  const std::vector<std::string> totals = lines_with(text, "total time: ");
  ASSERT_EQ(totals.size(), 1U) << text;
  EXPECT_NE(totals[0].find("largest device: "), std::string::npos) << text;
  EXPECT_NE(totals[0].find("largest node: "), std::string::npos) << text;
  EXPECT_LT(text.find("total time: "), text.find("mpirun")) << text;
  EXPECT_LT(text.find("mpirun"), text.find("memory of a rank")) << text;
  // A third state is written before the oldest of two goes.
  EXPECT_NE(text.find("each: 2 are kept while another is written"), std::string::npos) << text;
}

TEST(PlanCommand, ItemsOfTheHostAreNamedAsSuch) {
  config::RunConfig config = large_config();
  const plan::Plan devices = plan_run(config, request("llama-3.1-8b", "h100-node"));
  const std::vector<std::string> headers =
      lines_with(plan_text(config, devices, {.path = "c.yaml"}), "measure, stage");
  ASSERT_EQ(headers.size(), 1U);
  const std::string& header = headers[0];
  // Items of the device, their sum, items of the host, their sum.
  EXPECT_LT(header.find("weights"), header.find("  device")) << header;
  EXPECT_LT(header.find("  device"), header.find("host: D")) << header;
  EXPECT_EQ(header.find("host: weights"), std::string::npos) << header;
  // Where ranks compute on the host, one sum is all there is.
  const plan::Plan hosts = plan_run(config, request("llama-3.1-8b", "cpu-cluster"));
  EXPECT_EQ(plan_text(config, hosts, {.path = "c.yaml"}).find("host: "), std::string::npos);
}

TEST(PlanCommand, WhatDoesNotHappenIsNotListed) {
  config::RunConfig config = large_config();
  config.ranks.stages = 1;
  config.residency = "streamed";
  config.scratch = {.directory = "/scratch", .memory_gib = 0};
  const plan::Plan plan = plan_run(config, request("llama-3.1-8b", "h100-node"));
  const std::string text = plan_text(config, plan, {.path = "c.yaml", .settings = {"residency=streamed"}});
  EXPECT_TRUE(lines_with(text, "load ").empty()) << text;
  EXPECT_EQ(text.find("fills and drains"), std::string::npos) << text;
  EXPECT_EQ(lines_with(text, "residency=streamed").size(), 1U) << text;
  EXPECT_EQ(text.find("--set residency=streamed"), text.rfind("--set residency=streamed")) << text;
  // Inputs of 32 blocks, 4096 channels, bf16: 2 GiB for each of 32 blocks.
  EXPECT_NE(text.find("scratch: 64.00 GiB a node in /scratch"), std::string::npos) << text;
  EXPECT_EQ(nlohmann::json::parse(plan_json(config, plan))["disk"]["scratch_bytes_per_node"],
            64.0 * (1LL << 30));
  // Steps of less than half a percent are summed, and shares still add up.
  EXPECT_EQ(lines_with(text, "other steps").size(), 1U) << text;
  for (const char* small : {"  0.0 %", "  0.1 %", "  0.4 %"})
    for (const std::string& line : lines_with(text, small))
      EXPECT_EQ(line.rfind("other steps", 0), 0U) << line;
}

TEST(PlanCommand, RanksReplaceThoseOfTheCluster) {
  PlanRequest asked = request("llama-3.1-8b", "h100-node");
  asked.n_ranks = 32;
  const plan::Plan plan = plan_run(large_config(), asked);
  EXPECT_EQ(plan.stages * plan.replicas, 32);
  EXPECT_EQ(plan.cluster.nodes, 4);
}

TEST(PlanCommand, TheConfigurationMayNameTheCluster) {
  config::RunConfig config = large_config();
  PlanRequest asked = request("llama-3.1-8b", "h100-node");
  config.plan.cluster = asked.cluster;
  asked.cluster.clear();
  EXPECT_EQ(plan_run(config, asked).cluster.name, "h100-node");
  config.plan.cluster.clear();
  EXPECT_NE(problem_of(config, asked).find("2 plan needs a cluster"), std::string::npos);
}

TEST(PlanCommand, BadInputSaysWhatWasExpected) {
  config::RunConfig config = large_config();
  PlanRequest asked = request("llama-3.1-8b", "none");
  EXPECT_NE(problem_of(config, asked).find("none.yaml: expected a cluster description, found nothing"),
            std::string::npos);
  asked = request("llama-3.1-8b", "h100-node");
  asked.model_config.clear();
  EXPECT_NE(problem_of(config, asked).find("models/not-here has no config.json"), std::string::npos);
  asked.model_config = asked.cluster;
  EXPECT_NE(
      problem_of(config, asked).find("expected a config.json or a directory that holds one, found another"),
      std::string::npos);
  // A model that cannot be run is not planned: a wrong figure would be worse than none.
  EXPECT_EQ(problem_of(config, request("qwen3-235b-a22b", "h100-node")).substr(0, 2), "3 ");
  // What does not fit ends with the code of a configuration.
  asked = request("llama-3.1-405b", "h100-node");
  config.residency = "resident";
  EXPECT_EQ(problem_of(config, asked).substr(0, 2), "2 ");
}

}  // namespace
}  // namespace isobath::cli
