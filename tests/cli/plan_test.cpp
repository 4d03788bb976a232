#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <isobath/cli/plan.hpp>
#include <isobath/core/error.hpp>
#include <nlohmann/json.hpp>

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
  const std::string text = plan_text(config, plan);

  EXPECT_EQ(json["ranks"], 8);
  EXPECT_EQ(json["stages"].get<int>() * json["replicas"].get<int>(), 8);
  EXPECT_NE(text.find(fmt::format("--set ranks.stages={} --set ranks.replicas={}", json["stages"].get<int>(),
                                  json["replicas"].get<int>())),
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
  const config::RunConfig config = large_config();
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
  EXPECT_EQ(problem_of(config, asked).substr(0, 2), "2 ");
}

}  // namespace
}  // namespace isobath::cli
