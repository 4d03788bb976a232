#include <gtest/gtest.h>

#include <isobath/data/shards.hpp>
#include <isobath/pipeline/schedule.hpp>
#include <isobath/plan/time.hpp>

#include "tests/plan/tiny.hpp"

namespace isobath::plan {
namespace {

TEST(Layout, SharesAreThoseOfTheShardPlan) {
  const model::ModelConfig model = tiny_model();
  for (const int64_t sequences : {4, 10, 33}) {
    for (const int64_t shards : {1, 3, 16}) {
      for (const int64_t microbatch : {1, 2, 5}) {
        const config::Calibration calibration{.tokens = {},
                                              .sequences = sequences,
                                              .length = 5,
                                              .microbatch = microbatch,
                                              .logical_shards = shards};
        const data::ShardPlan plan(sequences, shards, microbatch);
        for (const auto& [stages, replicas] : {std::pair{1, 1}, std::pair{2, 3}, std::pair{4, 2}}) {
          const Layout layout = Layout::of(calibration, model, stages, replicas);
          EXPECT_EQ(layout.n_shards, plan.n_shards());
          EXPECT_EQ(layout.microbatches_per_replica, std::ssize(plan.microbatches_of(0, replicas)));
          int64_t largest = 0;
          for (const data::Microbatch& held : plan.microbatches())
            largest = std::max(largest, held.sequences.size());
          EXPECT_EQ(layout.largest_microbatch, largest);
          EXPECT_EQ(layout.sequences_per_replica, plan.sequences_of(0, replicas).size());
          EXPECT_EQ(layout.sequences_per_rank, plan.sequences_of(0, stages * replicas).size());
          EXPECT_EQ(layout.shards_per_rank, plan.shards_of(0, stages * replicas).size());
        }
      }
    }
  }
}

TEST(Layout, PipelineDrainsBetweenSegments) {
  const model::ModelConfig model = tiny_model();
  // 512 sequences in 64 shards of 8 microbatches; a segment of 4 stages is 128 microbatches, 16 shards.
  const config::Calibration calibration{
      .tokens = {}, .sequences = 512, .length = 5, .microbatch = 1, .logical_shards = 64};
  EXPECT_EQ(Layout::of(calibration, model, 4, 1).segments, 4);
  EXPECT_EQ(Layout::of(calibration, model, 4, 2).segments, 2);
  EXPECT_EQ(Layout::of(calibration, model, 1, 1).segments, 64);
}

/// Time until every stage has run its steps in the order of the schedule, each as soon as what it needs is
/// there.
double simulated_s(int64_t n_microbatches, int n_stages, double forward_s, double backward_s) {
  using pipeline::Step;
  std::map<std::tuple<int, Step::Kind, int64_t>, double> done;
  std::vector<std::vector<Step>> left;
  for (int stage = 0; stage < n_stages; ++stage)
    left.push_back(pipeline::one_forward_one_backward(n_microbatches, stage, n_stages));
  std::vector<size_t> next(left.size(), 0);
  std::vector<double> now(left.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < n_stages; ++stage) {
      const auto s = static_cast<size_t>(stage);
      if (next[s] == left[s].size()) continue;
      const Step step = left[s][next[s]];
      const bool is_forward = step.kind == Step::Kind::forward;
      const int needed = is_forward ? stage - 1 : stage + 1;
      double ready = 0;
      if (needed >= 0 && needed < n_stages) {
        const auto found = done.find({needed, step.kind, step.microbatch});
        if (found == done.end()) continue;
        ready = found->second;
      }
      now[s] = std::max(now[s], ready) + (is_forward ? forward_s : backward_s);
      done[{stage, step.kind, step.microbatch}] = now[s];
      ++next[s];
      moved = true;
    }
  }
  return *std::max_element(now.begin(), now.end());
}

TEST(Time, TheScheduleTakesMicrobatchesPlusStagesMinusOne) {
  for (const int64_t microbatches : {1, 3, 8, 64})
    for (const int stages : {1, 2, 5, 8})
      EXPECT_DOUBLE_EQ(simulated_s(microbatches, stages, 1, 3),
                       static_cast<double>(microbatches + stages - 1) * (1 + 3))
          << microbatches << " x " << stages;
}

TEST(Time, MeasureIsMicrobatchesAndBubblesOfTheSlowestStage) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 2;
  cluster.compute.bf16_tflops = 1e-12;  // one flop a second

  config.ranks.activation_gib = 0;  // all recomputed

  // Stages [0, 2) and [2, 4). A microbatch of 5 tokens: 3 · 2 · 5 · 576 a block; the head 2 · 2 · 5 · 32 · 8.
  const Job job(config, model, cluster, 2, 1);
  ASSERT_EQ(job.layout.blocks, (std::vector<Range>{{0, 2}, {2, 4}}));
  const double stage_s = 2 * (3 * 2 * 5 * 576) + 2 * (2 * 5 * 32 * 8);
  const StageTime time = measure_time(job);
  EXPECT_DOUBLE_EQ(time.compute_s, 4 * stage_s);
  EXPECT_DOUBLE_EQ(time.idle_s, stage_s);  // one segment, one step to fill

  // From block 3 on: the last stage alone, one block and the head.
  const StageTime late = measure_time(job, 3);
  EXPECT_DOUBLE_EQ(late.compute_s, 4 * (3 * 2 * 5 * 576 + 2 * (2 * 5 * 32 * 8)));
  EXPECT_EQ(late.idle_s, 0);
  // From block 1 on: the slowest stage is the last one still.
  EXPECT_DOUBLE_EQ(measure_time(job, 1).compute_s, 4 * stage_s);

  // Two replicas halve the microbatches.
  EXPECT_DOUBLE_EQ(measure_time(Job(config, model, cluster, 1, 2)).compute_s,
                   2 * (4 * (3 * 2 * 5 * 576) + 2 * (2 * 5 * 32 * 8)));

  // Clusters of rows come from a pass of their own over half of the sequences, with one more step to fill.
  config.sensitivity.row_groups = 2;
  config.sensitivity.grouping = "cluster";
  config.sensitivity.grouping_sequences = config.calibration.sequences / 2;
  const Job clustered(config, model, cluster, 2, 1);
  config::RunConfig plain = config;
  plain.sensitivity.grouping = "index";
  const Job by_index(plain, model, cluster, 2, 1);
  EXPECT_DOUBLE_EQ(measure_time(clustered).compute_s, 1.5 * measure_time(by_index).compute_s);
  EXPECT_DOUBLE_EQ(measure_time(clustered).idle_s, 2 * measure_time(by_index).idle_s);
  EXPECT_DOUBLE_EQ(measure_time(clustered, 1).compute_s, measure_time(by_index, 1).compute_s);
}

TEST(Time, ScoredCheckpointsAreReadOnceByEachReplica) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.sensitivity.gram_bits = {2, 4};
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 2;
  cluster.filesystem.read_gbs = cluster.filesystem.node_read_gbs = 1e-9;  // a byte a second
  const auto disk_s = [&](int64_t first_block) {
    return measure_time(Job(config, model, cluster, 1, 2), first_block).disk_s;
  };
  const double rounded_s = disk_s(0), late_s = disk_s(1);
  config.sensitivity.gram_checkpoints = {"two", "four"};
  // Four blocks of 576 weights: two and four bits, a scale of two bytes for each of the 64 rows, and two
  // norms.
  const double block_bytes = 576.0 * (2 + 4) / 8 + 2 * (2 * 64 + 2 * 2 * 8);
  EXPECT_NEAR(disk_s(0) - rounded_s, 2 * 4 * block_bytes, 1e-6);
  EXPECT_EQ(disk_s(1), late_s);
}

TEST(Time, BlocksThatKeepTheirActivationsAreNotRecomputed) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 2;
  cluster.compute.bf16_tflops = 1e-12;
  // A block and microbatch of 5 tokens: q and o's input 2·8, k and v 2·4, middle 8, gate and up 2·16 channels
  // of 2 bytes, and two heads' sums in f32: 680 bytes. Two microbatches are in flight at stage 0, one at
  // stage 1.
  const auto kept = [&](double bytes) {
    config.ranks.activation_gib = bytes / (1 << 30);
    const Job job(config, model, cluster, 2, 1);
    return std::pair{job.kept_blocks(0), job.kept_blocks(1)};
  };
  EXPECT_EQ(kept(600), (std::pair<int64_t, int64_t>{0, 0}));
  EXPECT_EQ(kept(700), (std::pair<int64_t, int64_t>{0, 1}));
  EXPECT_EQ(kept(1400), (std::pair<int64_t, int64_t>{1, 2}));
  EXPECT_EQ(kept(1e6), (std::pair<int64_t, int64_t>{2, 2}));

  const double block_s = 2 * 5 * 576, head_s = 2 * (2 * 5 * 32 * 8);
  (void)kept(1e6);
  EXPECT_DOUBLE_EQ(measure_time(Job(config, model, cluster, 2, 1)).compute_s, 4 * (2 * 2 * block_s + head_s));
  // Stage 0 recomputes both its blocks and is the slowest; stage 1 one of two, and none from block 3 on.
  (void)kept(700);
  const Job job(config, model, cluster, 2, 1);
  EXPECT_DOUBLE_EQ(measure_time(job).compute_s, 4 * (2 * 3 * block_s));
  EXPECT_DOUBLE_EQ(measure_time(job, 2).compute_s, 4 * ((3 + 2) * block_s + head_s));
  EXPECT_DOUBLE_EQ(measure_time(job, 3).compute_s, 4 * (2 * block_s + head_s));
}

TEST(Time, TransfersOfTheSchedule) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  config.quantization.weighting = "sensitivity";
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 4;
  // One byte a second: a state is 5 tokens of 8 channels of 2 bytes. An inner stage has two neighbours, a
  // state and a gradient each.
  cluster.network.device_within_node_gbs = 1e-9;
  EXPECT_NEAR(measure_time(Job(config, model, cluster, 4, 1)).communication_s, 4 * (4 * 80), 1e-6);
  EXPECT_NEAR(measure_time(Job(config, model, cluster, 2, 1)).communication_s, 4 * (2 * 80), 1e-6);
  EXPECT_EQ(measure_time(Job(config, model, cluster, 1, 1)).communication_s, 0);
}

TEST(Time, AllRootsFactorizeAtOnce) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 4;
  cluster.host.f64_factor_tflops = 1e-12;
  const auto factor_s = [&](int stages) {
    return quantize_time(Job(config, model, cluster, stages, 1), {}).compute_s;
  };
  // 4 blocks of q, k, v, o, gate, up at d = 8 and down at d = 16.
  constexpr double kSmall = 512 / 3.0, kLarge = 4096 / 3.0;
  EXPECT_NEAR(factor_s(1), 4 * (6 * kSmall + kLarge), 1e-6);
  EXPECT_NEAR(factor_s(2), 4 * (4 * kSmall + kLarge), 1e-6);  // two of q, k, v on one rank
  EXPECT_NEAR(factor_s(4), 4 * (3 * kSmall + kLarge), 1e-6);
  // D = 1: one H an input set.
  config.quantization.weighting = "none";
  EXPECT_NEAR(factor_s(1), 4 * (3 * kSmall + kLarge), 1e-6);
  config.quantization.solver = "round_to_nearest";
  EXPECT_LT(factor_s(1), 1e-6);
}

TEST(Time, ObjectivesAreSharedByTheRanks) {
  model::ModelConfig model = tiny_model();
  model.d_ff = 256;
  config::RunConfig config = tiny_config();
  config.quantization.clip_search = false;
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 4;
  cluster.host.f32_thin_tflops = 1e-12;
  const auto objective_s = [&](int stages) {
    for (const auto& [step, step_s] : quantize_time(Job(config, model, cluster, stages, 1), {}).parts)
      if (step == "objective before and after") return step_s;
    return -1.0;
  };
  // Round-to-nearest alone, rows·d·(d + a panel): gate and up have four tiles of 64 rows, the others one tile
  // or less.
  const double others = (8 + 4 + 4 + 8) * 64 + 8 * 256 * 256;
  EXPECT_NEAR(objective_s(1), 4 * 2 * (2.0 * 256 * 64 + others), 1e-6);
  EXPECT_NEAR(objective_s(4), 4 * 2 * (2.0 * 64 * 64 + others), 1e-6);
}

TEST(Time, WhatIsConfiguredIsPriced) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  Cluster cluster = instant_cluster();
  cluster.compute.bf16_tflops = 1e-12;
  const auto part = [&](const std::string& name) {
    for (const auto& [step, step_s] : quantize_time(Job(config, model, cluster, 1, 1), {}).parts)
      if (step == name) return step_s;
    return -1.0;
  };
  // 20 tokens through 4 blocks, and a second time for the original model.
  constexpr double kForward = 4 * 2.0 * 20 * 576;
  EXPECT_NEAR(part("forward"), kForward, 1e-6);
  EXPECT_EQ(part("refinement"), -1);
  EXPECT_EQ(part("asymmetric correction"), -1);
  config.quantization.asymmetric.correction = "gptaq";
  EXPECT_NEAR(part("forward"), 2 * kForward, 1e-6);
  cluster.host.f64_gemm_tflops = cluster.host.f64_factor_tflops = 1e-12;
  // Two triangular solves of d³, of 8 channels and of 16.
  EXPECT_NEAR(part("asymmetric correction"), 4 * (6 * 2 * 512 + 2 * 4096), 1e-6);
  EXPECT_EQ(Job(config, model, cluster, 1, 1).hidden_bytes(), 2 * 20 * 8 * 2);
  config.quantization.asymmetric.correction = "none";

  config.quantization.refinement.sweeps = 1;
  cluster.host.f32_thin_tflops = 1e-12;
  // group 0: a group is a whole row, and a slab the whole of H. One tile of rows a module; a slab of each of
  // the seven modules' factors.
  EXPECT_NEAR(part("refinement"),
              4 * (2.0 * 64 * (6 * 8 * 6.5 * 8 + 16 * 6.5 * 16) + 6 * 8 * 8 * 8 + 16 * 16 * 16), 1e-6);
  config.quantization.refinement.sweeps = 0;

  cluster = instant_cluster();
  cluster.compute.memory_gbs = 1e-9;
  const double without = part("covariance");
  config.sensitivity.shrinkage = -1;
  // x to f32 and squared, 18 bytes a channel: three sets of 8 and one of 16 channels.
  EXPECT_NEAR(part("covariance") - without, 4 * 20.0 * 18 * (3 * 8 + 16), 1e-3);
}

TEST(Time, FactorsGoBetweenCpuRanksByMpi) {
  model::ModelConfig model = tiny_model();
  model.d_ff = 4096;
  const config::RunConfig config = tiny_config();
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 2;
  const auto sent_s = [&] {
    for (const auto& [step, step_s] : quantize_time(Job(config, model, cluster, 2, 1), {}).parts)
      if (step == "H and factor to all ranks") return step_s;
    return -1.0;
  };
  // f32 panels of every factor, those of the wide one in f64 too; of each byte a rank passes half twice.
  const double bytes = 4 * (6 * 4 * panel_entries(8) + (4 + 8) * panel_entries(4096));
  cluster.network.within_node_gbs = cluster.network.device_within_node_gbs = 1e-9;
  EXPECT_NEAR(sent_s() / bytes, 2.0 / 2, 1e-9);
  // NCCL passes it once.
  cluster.device = "cuda";
  cluster.memory.device_gib = 1;
  EXPECT_NEAR(sent_s() / bytes, 1.0 / 2, 1e-9);
}

TEST(Time, RowsOfDevicesTakeTheirRates) {
  model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.quantization.refinement.sweeps = 2;
  Cluster cluster = instant_cluster();
  cluster.device = "cuda";
  cluster.memory.device_gib = 1;
  // What the host would take for them does not count.
  cluster.host.f32_thin_tflops = cluster.host.column_gflops = cluster.host.candidate_gps = 1e-30;
  config.quantization.clip_search = false;
  const auto part = [&](const std::string& name) {
    for (const auto& [step, step_s] : quantize_time(Job(config, model, cluster, 1, 1), {}).parts)
      if (step == name) return step_s;
    return -1.0;
  };
  // 4 blocks of six modules with 8 columns and one with 16.
  constexpr double kColumns = 4 * (6 * 8 + 16);
  cluster.rows.column_us = 1e6;
  EXPECT_NEAR(part("codes of the rows"), kColumns, 1e-6);
  EXPECT_NEAR(part("refinement"), 0, 1e-6);
  cluster.rows.refined_column_us = 1e6;
  EXPECT_NEAR(part("refinement"), 2 * kColumns, 1e-6);
  // A wide H is factorized there, a narrow one on a host.
  cluster.rows.f64_gemm_tflops = 1e-12;
  EXPECT_NEAR(part("factorization"), 0, 1e-6);
  model.d_ff = 4096;
  EXPECT_NEAR(part("factorization") / (4 * factorize_spread(4096, 1).f64_gemm_flops), 1, 1e-9);
}

TEST(Time, ReestimationIsThePassesOverLaterBlocks) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = tiny_config();
  Cluster cluster = instant_cluster();
  cluster.compute.bf16_tflops = 1e-9;
  cluster.compute.f32_tflops = 1e-9;
  const Job job(config, model, cluster, 1, 1);
  const double never = quantize_time(job, {.policy = "never"}).total_s();
  EXPECT_NEAR(quantize_time(job, {.policy = "every", .blocks = 2}).total_s() - never,
              measure_time(job, 2).total_s(), 1e-9);
  EXPECT_NEAR(
      quantize_time(job, {.policy = "every", .blocks = 1}).total_s() - never,
      measure_time(job, 1).total_s() + measure_time(job, 2).total_s() + measure_time(job, 3).total_s(), 1e-9);
  EXPECT_EQ(quantize_time(job, {.policy = "every", .blocks = 4}).total_s(), never);
  // Drift at most: a comparison on all sequences costs a refresh more.
  EXPECT_NEAR(
      quantize_time(job, {.policy = "drift", .blocks = 2, .probe_sequences = 1'000'000}).total_s() - never,
      2 * (quantize_time(job, {.policy = "every", .blocks = 2}).total_s() - never), 1e-9);
}

TEST(Time, PartsMakeTheWhole) {
  const model::ModelConfig model = tiny_model();
  const config::RunConfig config = tiny_config();
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 2;
  cluster.compute.f32_tflops = cluster.host.f64_gemm_tflops = cluster.host.f32_thin_tflops = 1e-9;
  cluster.network.within_node_gbs = 1e-6;
  cluster.filesystem.write_gbs = 1e-6;
  const StageTime time = quantize_time(Job(config, model, cluster, 2, 1), {.policy = "every", .blocks = 2});
  double sum = 0;
  for (const auto& [step, step_s] : time.parts) sum += step_s;
  // The embedding's broadcast, on the device network, is instant here.
  EXPECT_NEAR(sum, time.total_s(), 1e-9 * sum);
}

}  // namespace
}  // namespace isobath::plan
