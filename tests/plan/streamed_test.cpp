#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/plan/plan.hpp>

#include "tests/plan/tiny.hpp"

namespace isobath::plan {
namespace {

constexpr double kBlock = 2 * (576 + 16), kEnd = 2 * 32 * 8;  // bytes of the tiny model in bf16
constexpr double kStates = 4 * 5 * 8 * 2;                     // all sequences' hidden states

config::RunConfig streamed_config() {
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  config.residency = "streamed";
  return config;
}

double device_bytes(const RankMemory& memory, const std::string& name) {
  for (const RankMemory::Item& item : memory.items)
    if (item.name == name) return item.device_bytes;
  return -1;
}

double host_bytes(const RankMemory& memory, const std::string& name) {
  for (const RankMemory::Item& item : memory.items)
    if (item.name == name) return item.host_bytes;
  return -1;
}

TEST(Streamed, MeasureHoldsTwoBlocksAndTheInputsOfAll) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = streamed_config();
  const Cluster cluster = instant_cluster();
  const RankMemory memory = measure_memory(Job(config, model, cluster, 1, 1), 0);
  EXPECT_EQ(device_bytes(memory, "weights"), 2 * kBlock);
  EXPECT_EQ(device_bytes(memory, "block inputs"), 0);
  EXPECT_EQ(host_bytes(memory, "block inputs"), 4 * kStates);
  EXPECT_EQ(device_bytes(memory, "states"), kStates);
}

TEST(Streamed, AScratchDirectoryTakesTheInputsBeyondMemory) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = streamed_config();
  const Cluster cluster = instant_cluster();
  EXPECT_EQ(scratch_bytes(Job(config, model, cluster, 1, 1)), 0);
  config.scratch = {.directory = "scratch", .memory_gib = 500.0 / (1 << 30)};
  // 16 inputs of a microbatch, 80 bytes each: 6 of them fit.
  const Job job(config, model, cluster, 1, 1);
  EXPECT_EQ(host_bytes(measure_memory(job, 0), "block inputs"), 6 * 80);
  EXPECT_EQ(block_inputs(job, 0).memory_bytes, 6 * 80);
  EXPECT_EQ(block_inputs(job, 0).disk_bytes, 10 * 80);
  EXPECT_EQ(scratch_bytes(job), 10 * 80);
  EXPECT_EQ(plan_of(config, model, cluster, 1, 1).disk.scratch_bytes, 10 * 80);
  // Two replicas of a node have half of the sequences each, and as much memory.
  Cluster two = cluster;
  two.ranks_per_node = 2;
  EXPECT_EQ(scratch_bytes(Job(config, model, two, 1, 2)), 2 * (8 - 6) * 80);
  // What is not measured leaves nothing there, nor do resident weights.
  config.quantization.weighting = "none";
  EXPECT_EQ(scratch_bytes(job), 0);
  config.quantization.weighting = "sensitivity";
  config.residency = "resident";
  EXPECT_EQ(scratch_bytes(Job(config, model, cluster, 1, 1)), 0);
}

TEST(Streamed, QuantizeReadsOneBlockAheadOfTheOneInWork) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = streamed_config();
  const Cluster cluster = instant_cluster();
  const RankMemory memory = quantize_memory(Job(config, model, cluster, 1, 1), 0);
  EXPECT_EQ(device_bytes(memory, "weights"), kBlock);
  EXPECT_EQ(device_bytes(memory, "block in work"), kBlock);
}

TEST(Streamed, EvaluationHoldsTwoBlocksOrBothHeads) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = streamed_config();
  const Cluster cluster = instant_cluster();
  EXPECT_EQ(device_bytes(evaluate_memory(Job(config, model, cluster, 1, 1), 0), "weights of both models"),
            std::max(2 * kBlock, 2 * kEnd));
}

TEST(Streamed, DiskIsWaitedForWhereItIsSlowerThanTheBlocks) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = streamed_config();
  Cluster cluster = instant_cluster();
  const double at_once = measure_time(Job(config, model, cluster, 1, 1)).disk_s;
  cluster.filesystem.read_gbs = cluster.filesystem.node_read_gbs = 1e-9;  // a byte a second
  const Job job(config, model, cluster, 1, 1);
  EXPECT_EQ(load_time(job).disk_s, 0);
  // Forward and backward: each block twice. The statistics are read back at the same rate.
  const double statistics = 4 * 4 * 7 * 20;
  EXPECT_NEAR(measure_time(job).disk_s - at_once, 2 * 4 * kBlock + statistics, 1e-6);
  EXPECT_GE(quantize_time(job, {.policy = "never", .blocks = 1}).disk_s, 4 * kBlock);
  // Nobody waits for a disk that is faster than the compute.
  cluster.compute.bf16_tflops = 1e-15;
  cluster.filesystem.read_gbs = cluster.filesystem.node_read_gbs = 1e-6;
  EXPECT_NEAR(measure_time(Job(config, model, cluster, 1, 1)).disk_s, statistics / 1e3, 1e-6);
}

TEST(Streamed, ARunOnManyRanksIsOneStage) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = streamed_config();
  Cluster cluster = with_ranks(instant_cluster(), 2);
  const Plan plan = make_plan(config, model, cluster);
  EXPECT_EQ(plan.stages, 1);
  EXPECT_EQ(plan.replicas, 2);
}

TEST(Streamed, IsProposedWhereResidentWeightsDoNotFit) {
  model::ModelConfig model = tiny_model();
  model.n_blocks = 4000;  // 4.5 MiB
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  config.residency = "resident";
  config.scratch = {.directory = "scratch", .memory_gib = 0};
  Cluster cluster = instant_cluster();
  cluster.memory.node_gib = (0.25 + 2.0 / 1024) / kUsableShare;  // the process and 2 MiB
  try {
    (void)make_plan(config, model, cluster);
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("smallest that would do: residency: streamed on these ranks; or"), std::string::npos)
        << text;
  }
  config.residency = "streamed";
  EXPECT_EQ(make_plan(config, model, cluster).residency, "streamed");
  config.residency = "auto";
  EXPECT_EQ(make_plan(config, model, cluster).residency, "streamed");
  cluster.memory.node_gib = 100;
  EXPECT_EQ(make_plan(config, model, cluster).residency, "resident");
}

TEST(Streamed, ALocalDiskIsProposedWhereBlockInputsDoNotFit) {
  model::ModelConfig model = tiny_model();
  model.n_blocks = 1000;  // inputs of 312 KiB
  config::RunConfig config = streamed_config();
  config.scratch.memory_gib = 0;
  Cluster cluster = instant_cluster();
  cluster.memory.node_gib = (0.25 + 0.25 / 1024) / kUsableShare;
  const auto refusal = [&] {
    try {
      (void)make_plan(config, model, cluster);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  const auto names = [](const std::string& text, const std::string& what) {
    return text.find(what) != std::string::npos;
  };
  const std::string disk = "--set scratch.directory=DIR (a local disk with 1 GiB a node); or ";
  for (const char* residency : {"streamed", "auto"}) {
    config.residency = residency;
    EXPECT_TRUE(names(refusal(), "smallest that would do: on these ranks with " + disk)) << refusal();
  }
  // Weights may not be streamed: neither setting alone would do.
  config.residency = "resident";
  EXPECT_TRUE(
      names(refusal(), "smallest that would do: on these ranks with --set residency=streamed " + disk))
      << refusal();
  // What it names does fit; where it is configured already, it is not named.
  config.residency = "auto";
  config.scratch.directory = "DIR";
  EXPECT_EQ(refusal(), "accepted");
  cluster.memory.node_gib = 0.25;
  EXPECT_FALSE(names(refusal(), "scratch.directory")) << refusal();
  // Nor where it would not be enough.
  config.scratch.directory.clear();
  EXPECT_FALSE(names(refusal(), "scratch.directory")) << refusal();
}

}  // namespace
}  // namespace isobath::plan
