#include <gtest/gtest.h>

#include <isobath/data/shards.hpp>
#include <isobath/pipeline/schedule.hpp>
#include <isobath/plan/memory.hpp>
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
  // Two triangular solves of d³, and C times one tile of rows, of 8 channels and of 16.
  EXPECT_NEAR(part("asymmetric correction"), 4 * (6 * (2 * 512 + 2 * 64 * 64) + 2 * 4096 + 2 * 64 * 256),
              1e-6);
  EXPECT_EQ(Job(config, model, cluster, 1, 1).hidden_bytes(), 2 * 20 * 8 * 2);
  config.quantization.asymmetric.correction = "none";

  config.quantization.refinement.sweeps = 1;
  cluster.host.f32_thin_tflops = 1e-12;
  // group 0: a group is a whole row. One tile of rows a module.
  EXPECT_NEAR(part("refinement"), 4 * 2.0 * 64 * (6 * 8 * (8 + 5 * 8) + 16 * (16 + 5 * 16)), 1e-6);
  config.quantization.refinement.sweeps = 0;

  cluster = instant_cluster();
  cluster.compute.memory_gbs = 1e-9;
  const double without = part("covariance");
  config.sensitivity.shrinkage = -1;
  // x to f32 and squared, 18 bytes a channel: three sets of 8 and one of 16 channels.
  EXPECT_NEAR(part("covariance") - without, 4 * 20.0 * 18 * (3 * 8 + 16), 1e-3);
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

TEST(Memory, MeasureHoldsOneInputForEachBlockAndMicrobatchInFlight) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  const Cluster cluster = instant_cluster();
  const Job job(config, model, cluster, 2, 1);
  const auto item = [](const RankMemory& memory, const std::string& name) {
    for (const auto& found : memory.items)
      if (found.name == name) return found;
    return RankMemory::Item{"missing", -1, -1};
  };
  constexpr double kState = 5 * 8 * 2;  // a microbatch of 5 tokens, 8 channels, bf16
  const RankMemory first = measure_memory(job, 0), last = measure_memory(job, 1);
  EXPECT_EQ(item(first, "weights").device_bytes, 2 * 2 * (576 + 16) + 2 * 32 * 8);
  EXPECT_EQ(item(first, "in flight").device_bytes, 2 * 2 * kState);
  EXPECT_EQ(item(last, "in flight").device_bytes, 1 * (2 + 1) * kState);  // and the last block's output
  // f32, seven linears, 20 tokens: of two blocks, and of one while it is gathered.
  EXPECT_DOUBLE_EQ(item(first, "D").host_bytes, (2 + 8.0 / 7) * 4 * 7 * 20);
}

TEST(Memory, KeptActivationsAreThoseOfTheLastBlocks) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  config.ranks.activation_gib = 1400.0 / (1 << 30);
  const Cluster cluster = instant_cluster();
  const Job job(config, model, cluster, 2, 1);
  const auto bytes = [&](int stage, const std::string& name) {
    for (const auto& found : measure_memory(job, stage).items)
      if (found.name == name) return found.device_bytes;
    return -1.0;
  };
  EXPECT_EQ(bytes(0, "activations kept"), 1 * 2 * 680);
  EXPECT_EQ(bytes(1, "activations kept"), 2 * 1 * 680);
  // Stage 0 holds the recomputed block's activations on top; the loss of stage 1 takes more than a block:
  // 256 x 32 logits in bf16, three times, and 12 bytes of f32. Gradients of 80 bytes in and out.
  // 5 tokens: states 4·2·8, gate and up 2·2·16, the gate in f32 26·16; of a sequence 8·16 + 4·8.
  EXPECT_EQ(bytes(0, "backward"), 680 + 5 * (64 + 64 + 26 * 16) + 5 * (128 + 32) + 2 * 80);
  EXPECT_EQ(bytes(1, "backward"), 256 * 32 * (3 * 2 + 12) + 2 * 80);
}

TEST(Memory, QuantizeHoldsTheCovariancesOfOneInputSet) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  const Cluster cluster = instant_cluster();
  const auto held = [&](const std::string& name) {
    const Job job(config, model, cluster, 1, 1);
    for (const auto& found : quantize_memory(job, 0).items)
      if (found.name == name) return std::pair{found.device_bytes, found.host_bytes};
    return std::pair{-1.0, -1.0};
  };
  // down, d = 16: one H of 1024 bytes, partial sums on two levels and one that arrives. q/k/v, d = 8: 256
  // bytes, 3 and 3 · 2 + 1 of them: less. Factors and rows are less, too.
  EXPECT_EQ(held("H, factors and rows"), (std::pair{1 * 1024.0, 3 * 1024.0}));
  // And f32 copies of the microbatch in work, 8 bytes a channel.
  EXPECT_EQ(held("hidden states"), (std::pair{20.0 * 2 * (8 + 16) + 5 * 8 * 16, 0.0}));
  // H and its f64 triangle take less than what summing held, which is free by then.
  EXPECT_EQ(quantize_memory(Job(config, model, cluster, 1, 1), 0).root_bytes, 0);

  // With a correction C too: sums and partial sums of both. While it is made: H, C, the factor, five f64
  // matrices and the result.
  config.quantization.asymmetric.correction = "qep";
  config.quantization.refinement.sweeps = 1;
  EXPECT_EQ(held("H, factors and rows"), (std::pair{2 * 1024.0, 5 * 1024.0}));
  EXPECT_EQ(quantize_memory(Job(config, model, cluster, 1, 1), 0).root_bytes,
            2 * 1024 + 1024 + 44 * 256 - (2 + 5) * 1024);
  EXPECT_EQ(held("block in work").first, 2 * 2 * (576 + 16));
  EXPECT_EQ(held("hidden states"), (std::pair{2 * 20.0 * 2 * (8 + 16) + 5 * (8 + 12) * 16, 0.0}));

  // Two row groups on four ranks of one node, a shard each at most: two roots factorize at once. While rows
  // are solved: a factor, H, C and correction of both groups, a damped H, a panel, and 4 rows of 16 channels.
  Cluster node = cluster;
  node.ranks_per_node = 4;
  config.sensitivity.row_groups = 2;
  const RankMemory two = quantize_memory(Job(config, model, node, 4, 1), 0);
  EXPECT_EQ(two.root_bytes, 2 * 1024 + 1024 + 44 * 256 - ((1 + 2 * 3 + 1 + 1) * 1024 + 5 * 4 * 16));
  EXPECT_EQ(two.node_root_bytes, 2 * two.root_bytes);
}

TEST(Memory, AWideCovarianceIsSharedByTheRanks) {
  model::ModelConfig model = tiny_model();
  model.d_ff = 8192;
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  Cluster cluster = instant_cluster();
  cluster.ranks_per_node = 4;
  const auto solver_bytes = [&](int stages) {
    for (const auto& found : quantize_memory(Job(config, model, cluster, stages, 1), 0).items)
      if (found.name == "H, factors and rows") return found.device_bytes + found.host_bytes;
    return -1.0;
  };
  constexpr double kPanel = 384.0 * 8192;
  // 21 whole panels, and one of 128 columns.
  const double entries = 384.0 * 384 * (21 * 22 / 2) + 128.0 * 8192;
  // The f64 triangle, and of one panel f64 twice and f32; on four ranks the sums of the first pass are more:
  // six panels, a partial sum of each, and one that arrives.
  EXPECT_EQ(solver_bytes(1), 8 * entries + 20 * kPanel);
  EXPECT_EQ(solver_bytes(4), std::max(2 * entries + 20 * kPanel, 4 * (6 + 6 + 1) * kPanel));
  // What needs H whole on every rank is not spread.
  config.quantization.refinement.sweeps = 1;
  EXPECT_FALSE(Job(config, model, cluster, 4, 1).is_spread(8192));
  EXPECT_GT(solver_bytes(4), 4 * 8192.0 * 8192);
}

TEST(Memory, EvaluationHoldsTwoModelsLogitsInTheirDtype) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  Cluster cluster = instant_cluster();
  const auto logits = [&] {
    for (const auto& found : evaluate_memory(Job(config, model, cluster, 1, 1), 0).items)
      if (found.name == "logits") return found.device_bytes;
    return -1.0;
  };
  EXPECT_EQ(logits(), 128 * 32 * (4 + 24));
  cluster.compute.covariance_tflops = 1;
  EXPECT_EQ(logits(), 128 * 32 * 4);
}

}  // namespace
}  // namespace isobath::plan
