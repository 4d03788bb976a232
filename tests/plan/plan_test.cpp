#include <gtest/gtest.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/plan/plan.hpp>
#include <sstream>

#include "tests/plan/tiny.hpp"

namespace isobath::plan {
namespace {

Cluster shipped(const std::string& name) {
  std::ifstream file(std::string(ISOBATH_SOURCE_ROOT) + "/configs/clusters/" + name + ".yaml");
  std::ostringstream text;
  text << file.rdbuf();
  return parse_cluster(text.str(), name);
}

model::ModelConfig shipped_model(const std::string& name) {
  return model::read_model_config(std::string(ISOBATH_SOURCE_ROOT) + "/configs/models/" + name);
}

config::RunConfig large_config() {
  config::RunConfig config;
  config.calibration = {
      .tokens = {}, .sequences = 128, .length = 2048, .microbatch = 1, .logical_shards = 128};
  config.evaluation.tokens = "test.safetensors";
  return config;
}

TEST(Models, ShippedShapesHaveTheirPublishedSizes) {
  const auto parameters = [](const model::ModelConfig& model) {
    const Shapes s = Shapes::of(model, true, false);
    return s.n_blocks * s.block_weight_bytes() / 2 + 2 * s.vocabulary * s.d + s.d;
  };
  EXPECT_EQ(parameters(shipped_model("llama-3.1-8b")), 8'030'261'248);
  EXPECT_EQ(parameters(shipped_model("llama-3.1-70b")), 70'553'706'496);
  EXPECT_EQ(parameters(shipped_model("llama-3.1-405b")), 405'853'388'800);
}

TEST(Models, AMixtureOfExpertsIsRefusedByName) {
  try {
    (void)shipped_model("qwen3-235b-a22b");
    FAIL() << "accepted";
  } catch (const DataError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("Qwen3MoeForCausalLM"), std::string::npos) << text;
    EXPECT_NE(text.find("LlamaForCausalLM"), std::string::npos) << text;
  }
}

TEST(Plan, ProposesTheFastestGridThatFits) {
  const Cluster cluster = shipped("h100-node");
  const model::ModelConfig model = shipped_model("llama-3.1-70b");
  const config::RunConfig config = large_config();
  const Plan plan = make_plan(config, model, cluster);
  EXPECT_EQ(plan.stages * plan.replicas, 8);
  EXPECT_TRUE(fits(plan.need, cluster));
  EXPECT_TRUE(plan.computes_bf16);
  for (const int stages : {1, 2, 4, 8}) {
    const Plan other = plan_of(config, model, cluster, stages, 8 / stages);
    if (fits(other.need, cluster)) {
      EXPECT_LE(plan.total_s(), other.total_s()) << stages;
    }
  }
  // 141 GB of weights do not fit one device.
  EXPECT_FALSE(fits(plan_of(config, model, cluster, 1, 8).need, cluster));
}

TEST(Plan, ComparesPoliciesOnceEach) {
  const Cluster cluster = shipped("h100-node");
  const model::ModelConfig model = shipped_model("llama-3.1-8b");
  config::RunConfig config = large_config();
  config.quantization.reestimate = {.policy = "every", .blocks = 8};
  Plan plan = make_plan(config, model, cluster);
  ASSERT_EQ(plan.quantize.size(), 3U);
  EXPECT_EQ(plan.quantize[0].name, "every 8 blocks");
  EXPECT_TRUE(plan.quantize[0].is_configured);
  EXPECT_EQ(plan.quantize[1].name, "never");
  EXPECT_EQ(plan.quantize[2].name, "every block");
  EXPECT_LT(plan.quantize[1].time.total_s(), plan.quantize[0].time.total_s());
  EXPECT_LT(plan.quantize[0].time.total_s(), plan.quantize[2].time.total_s());
  // All are tracked, or none.
  const double untracked = plan.quantize[1].time.total_s();
  config.quantization.reestimate.track = true;
  plan = make_plan(config, model, cluster);
  EXPECT_GT(plan.quantize[1].time.total_s(), untracked);
  EXPECT_LT(plan.quantize[1].time.total_s(), plan.quantize[0].time.total_s());
}

TEST(Plan, TrackingCostsHalfAForwardPassOfItsSequencesABlock) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  Cluster cluster = instant_cluster();
  cluster.compute.f32_tflops = 1e-12;  // one operation a second
  config.compute_dtype = "float32";
  const auto time_of = [&](bool track, int64_t n_sequences) {
    config.quantization.reestimate = {.probe_sequences = n_sequences, .track = track};
    return plan_of(config, model, cluster, 1, 1).quantize[0].time.total_s();
  };
  // Products of 5 tokens: a block's linears; scores and values of 5 x 5 pairs, half of them masked or not;
  // logits.
  const double none = time_of(false, 1), one = time_of(true, 1), two = time_of(true, 2);
  constexpr double kHead = 2 * 5 * 8 * 32, kLinears = 2 * 5 * 576;
  // Blocks 1, 2, 3 of 4 behind the first, and so on, and once the original: 3 + 2 + 1 + 4. Three products of
  // the head behind each of four blocks.
  EXPECT_GE(one - none, 10 * kLinears + 4 * 3 * kHead);
  EXPECT_LE(one - none, 10 * (kLinears + 2 * 2 * 5 * 5 * 8) + 4 * 3 * kHead);
  EXPECT_NEAR(two - none, 2 * (one - none), 1e-9 * two);
}

TEST(Plan, TuningIsAStageWhoseEpochsCostTheSame) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  const Cluster cluster = instant_cluster();
  config.quantization.group = 8;
  const auto planned = [&](int64_t epochs) {
    config.quantization.tuning.epochs = epochs;
    return plan_of(config, model, cluster, 2, 1);
  };
  const Plan none = planned(0), one = planned(1), two = planned(2), three = planned(3);
  EXPECT_FALSE(none.tune);
  ASSERT_TRUE(one.tune);
  EXPECT_GT(one.tune->total_s(), one.measure->compute_s);
  EXPECT_DOUBLE_EQ(three.tune->total_s() - two.tune->total_s(), two.tune->total_s() - one.tune->total_s());
  EXPECT_DOUBLE_EQ(two.total_s() - none.total_s(), two.tune->total_s());
  EXPECT_EQ(one.disk.model_bytes, 2 * none.disk.model_bytes);
  // Four blocks of 576 weights, three f32 a scale: more than the hidden states.
  EXPECT_EQ(one.disk.generation_bytes, 12 * 4 * 576 / 8.0);
  EXPECT_LT(none.disk.generation_bytes, one.disk.generation_bytes);
  EXPECT_EQ(one.tune_memory.size(), 2U);
}

TEST(Plan, TheGridOfTheConfigurationIsKept) {
  config::RunConfig config = large_config();
  config.ranks.stages = 4;
  const Plan plan = make_plan(config, shipped_model("llama-3.1-8b"), shipped("h100-node"));
  EXPECT_EQ(plan.stages, 4);
  EXPECT_EQ(plan.replicas, 2);
  config.ranks.stages = 3;
  EXPECT_THROW((void)make_plan(config, shipped_model("llama-3.1-8b"), shipped("h100-node")), ConfigError);
}

TEST(Plan, WithoutDToMeasureThereIsNoMeasure) {
  config::RunConfig config = large_config();
  config.quantization.weighting = "none";
  config.evaluation.tokens.clear();
  const Plan plan = make_plan(config, shipped_model("llama-3.1-8b"), shipped("h100-node"));
  EXPECT_FALSE(plan.measure.has_value());
  EXPECT_FALSE(plan.evaluate.has_value());
  EXPECT_EQ(plan.quantize.size(), 1U);
  EXPECT_EQ(plan.disk.statistics_bytes, 0);
}

TEST(Plan, WhatCannotFitIsRefusedWithWhatWould) {
  Cluster cluster = shipped("h100-node");
  cluster.memory.device_gib = 24;
  const model::ModelConfig model = shipped_model("llama-3.1-70b");
  config::RunConfig config = large_config();
  config.residency = "resident";
  std::string text;
  try {
    (void)make_plan(config, model, cluster);
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.code(), ExitCode::config);
    text = error.what();
  }
  EXPECT_NE(text.find("the run does not fit 8 ranks on 1 node"), std::string::npos) << text;
  EXPECT_NE(text.find("a device needs"), std::string::npos) << text;
  const int64_t nodes = smallest_cluster(config, model, cluster, 64);
  ASSERT_GT(nodes, 1) << text;
  EXPECT_NE(text.find(fmt::format("smallest that would do: residency: streamed on these ranks; or {} nodes "
                                  "({} ranks)",
                                  nodes, 8 * nodes)),
            std::string::npos)
      << text;
  // What it names does fit, and one node less does not.
  EXPECT_NO_THROW((void)make_plan(config, model, with_ranks(cluster, 8 * nodes)));
  EXPECT_THROW((void)make_plan(config, model, with_ranks(cluster, 8 * (nodes - 1))), ConfigError);
}

TEST(Plan, ALocalDiskIsNamedWhereItWouldDo) {
  Cluster cluster = shipped("h100-node");
  cluster.memory.node_gib = 512;  // inputs of all blocks take 1 TiB
  const model::ModelConfig model = shipped_model("llama-3.1-405b");
  config::RunConfig config = large_config();
  std::string text;
  try {
    (void)make_plan(config, model, cluster);
  } catch (const ConfigError& error) {
    text = error.what();
  }
  config.scratch.directory = "/scratch";
  const Plan plan = make_plan(config, model, cluster);
  EXPECT_EQ(plan.residency, "streamed");
  const double gib = plan.disk.scratch_bytes / (1LL << 30);
  EXPECT_GT(gib, 0);
  EXPECT_NE(text.find(fmt::format("--set scratch.directory=DIR (a local disk with {:.0f} GiB a node)",
                                  std::ceil(gib))),
            std::string::npos)
      << text;
}

TEST(Plan, MoreMemoryIsNamedWhereNodesDoNotHelp) {
  // Every rank of a node holds the codes of a block and values of a module, whatever the number of nodes.
  Cluster cluster = shipped("h100-node");
  cluster.memory.node_gib = 16;
  try {
    (void)make_plan(large_config(), shipped_model("llama-3.1-70b"), cluster);
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("no number of nodes up to 256 of this kind"), std::string::npos) << text;
    EXPECT_NE(text.find("GiB a node"), std::string::npos) << text;
  }
}

TEST(Plan, WhatNeedsACovarianceWholeIsRefusedWhereItIsTooWide) {
  config::RunConfig config = large_config();
  EXPECT_TRUE(too_wide_to_hold(config, shipped_model("llama-3.1-70b")).empty());
  config.quantization.refinement.sweeps = 1;
  config.quantization.asymmetric.correction = "qep";
  EXPECT_TRUE(too_wide_to_hold(config, shipped_model("llama-3.1-405b")).empty());
  config.quantization.asymmetric.correction = "gptaq";
  EXPECT_TRUE(too_wide_to_hold(config, shipped_model("llama-3.1-8b")).empty());
  try {
    (void)make_plan(config, shipped_model("llama-3.1-70b"), shipped("h100-node"));
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("down_proj: 28672 input channels"), std::string::npos) << text;
    EXPECT_EQ(text.find("gate_proj"), std::string::npos) << text;
  }
}

TEST(Plan, ProposesTheMicrobatchThatSavesTime) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.quantization.clip_search = false;
  Cluster cluster = instant_cluster();
  EXPECT_EQ(make_plan(config, model, cluster).proposed_microbatch, 1);
  // Where starting operations is all that costs, two sequences at once halve it; a shard holds no more.
  cluster.compute.operation_us = 1e3;
  EXPECT_EQ(make_plan(config, model, cluster).proposed_microbatch, 2);
  config.calibration.microbatch = 2;
  EXPECT_EQ(make_plan(config, model, cluster).proposed_microbatch, 2);
}

TEST(Plan, AdvisesLogicalShardsForIdleRanks) {
  config::RunConfig config = large_config();
  config.calibration.logical_shards = 4;
  const Plan plan = make_plan(config, shipped_model("llama-3.1-8b"), shipped("h100-node"));
  ASSERT_FALSE(plan.advice.empty());
  EXPECT_NE(plan.advice[0].find("4 logical shards keep only 4 of 8 ranks busy"), std::string::npos);
}

}  // namespace
}  // namespace isobath::plan
