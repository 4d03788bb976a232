#include <gtest/gtest.h>

#include <isobath/plan/memory.hpp>

#include "tests/plan/tiny.hpp"

namespace isobath::plan {
namespace {

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

TEST(Memory, MeasureHoldsTheWeightsThatItScores) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.quantization.group = 8;
  config.quantization.reestimate = {.policy = "every", .blocks = 2};
  config.sensitivity.gram_bits = {2, 4};
  const Cluster cluster = instant_cluster();
  const auto scored = [&](const RankMemory& memory) {
    for (const auto& found : memory.items)
      if (found.name == "scored widths") return found.device_bytes;
    return -1.0;
  };
  const Job rounded(config, model, cluster, 2, 1);
  const double tile = score_bytes(rounded.shapes, 1);
  // A scale of bf16 and a zero point a group, two widths, two blocks a stage.
  EXPECT_EQ(scored(measure_memory(rounded, 0)), 2 * 2 * 576 * 3 / 8.0 + tile);
  EXPECT_EQ(scored(reestimation_memory(rounded, 1)), -1);
  config.sensitivity.gram_checkpoints = {"a", "b"};
  EXPECT_EQ(scored(measure_memory(Job(config, model, cluster, 2, 1), 0)), 2 * 2 * 576 * 2 + tile);
  config.residency = "streamed";
  EXPECT_EQ(scored(measure_memory(Job(config, model, cluster, 2, 1), 0)), 2 * 576 * 2 + tile);
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
  // 256 x 32 logits in bf16, twice, and 12 bytes of f32. Gradients of 80 bytes in and out.
  // 5 tokens: states 4·2·8, gate and up 2·2·16, the gate in f32 26·16; of a sequence 8·16.
  EXPECT_EQ(bytes(0, "backward"), 680 + 5 * (64 + 64 + 26 * 16) + 5 * 128 + 2 * 80);
  EXPECT_EQ(bytes(1, "backward"), 256 * 32 * (2 * 2 + 12) + 2 * 80);
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

  // With qep C too: sums and partial sums of both, less than what solving holds: two factors, C, a panel of
  // it, and for 8 rows of 16 channels 14 bytes a weight (errors, codes and their copy, W C and the target); a
  // slab.
  config.quantization.asymmetric = {.correction = "qep", .residual = 0};
  config.quantization.refinement.sweeps = 1;
  constexpr double kSlab = 4 * 16 * (16 + 16);
  EXPECT_EQ(held("H, factors and rows"), (std::pair{2 * 1024.0, 2 * 1024 + 14 * 8 * 16 + kSlab}));
  // The residual stream's 8 channels below C's 16: half of C more in the sums, in C itself and in its panel.
  config.quantization.asymmetric.residual = 1;
  EXPECT_EQ(held("H, factors and rows"), (std::pair{2.5 * 1024.0, 2 * 1024 + 512 + 14 * 8 * 16 + kSlab}));
  EXPECT_EQ(quantize_memory(Job(config, model, cluster, 1, 1), 0).root_bytes, 0);
  // gptaq: one factor, and M; while that is made H, C, the factor, five f64 matrices and the result.
  config.quantization.asymmetric.correction = "gptaq";
  EXPECT_EQ(held("H, factors and rows"), (std::pair{2 * 1024.0, 2 * 1024 + 14 * 8 * 16 + kSlab}));
  constexpr double kMaking = 2 * 1024 + 1024 + 44 * 256;
  EXPECT_EQ(quantize_memory(Job(config, model, cluster, 1, 1), 0).root_bytes,
            kMaking - (4 * 1024 + 14 * 8 * 16 + kSlab));
  EXPECT_EQ(held("block in work").first, 2 * 2 * (576 + 16));
  EXPECT_EQ(held("hidden states"), (std::pair{2 * 20.0 * 2 * (8 + 16) + 5 * (8 + 12) * 16, 0.0}));

  // Two row groups on four ranks of one node, a shard each at most: two roots make M at once. While rows are
  // solved: factors and M of both groups, C of one, a panel of it, 4 rows of 16 channels of each group, a
  // slab.
  Cluster node = cluster;
  node.ranks_per_node = 4;
  config.sensitivity.row_groups = 2;
  const RankMemory two = quantize_memory(Job(config, model, node, 4, 1), 0);
  EXPECT_EQ(two.root_bytes, kMaking - (6 * 1024 + 2 * 14 * 4 * 16 + kSlab));
  EXPECT_EQ(two.node_root_bytes, 2 * two.root_bytes);
}

TEST(Memory, TuningHoldsAMeasurePassAndTheCodes) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  config.quantization.group = 8;
  config.quantization.tuning.epochs = 1;
  const Cluster cluster = instant_cluster();
  const Job job(config, model, cluster, 2, 1);
  const auto item = [&](int stage, const std::string& name) {
    for (const auto& found : tune_memory(job, stage).items)
      if (found.name == name) return std::pair{found.device_bytes, found.host_bytes};
    return std::pair{-1.0, -1.0};
  };
  EXPECT_EQ(item(0, "in flight").first, 2 * 2 * 80);  // as measure
  EXPECT_EQ(item(0, "D").first, -1);
  // 2 blocks of 576 weights, groups of 8: codes; scales in bf16, zeros, and four times f32.
  EXPECT_EQ(item(0, "codes and scales").first, 2 * 576 + (2 + 1 + 16) * 2 * 576 / 8.0);
  EXPECT_EQ(item(0, "outputs of the original").first, -1);
  EXPECT_EQ(item(1, "outputs of the original").first, 4 * 80);
  const RankMemory last = tune_memory(job, 1);
  EXPECT_GE(memory_need(job).node_bytes, last.host_bytes() + last.device_bytes());
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
  // A refinement takes the rows of the factor slab by slab; less than what summing H took.
  config.quantization.refinement.sweeps = 1;
  EXPECT_TRUE(Job(config, model, cluster, 4, 1).is_spread(8192));
  EXPECT_EQ(solver_bytes(4), std::max(2 * entries + 20 * kPanel, 4 * (6 + 6 + 1) * kPanel));
  // qep: H beside the panels that become its ridge factor; or both factors, all rows of C, and its last pass.
  config.quantization.asymmetric = {.correction = "qep", .residual = 0};
  EXPECT_EQ(solver_bytes(1),
            std::max(12 * entries + 20 * kPanel, 8 * entries + 4 * 8192.0 * 8192 + 4 * (6 * 3 + 1) * kPanel));
  // C with the residual stream's channels.
  config.quantization.asymmetric.residual = 1;
  constexpr double kTall = (8192.0 + 8) / 8192;
  EXPECT_DOUBLE_EQ(solver_bytes(1),
                   std::max(12 * entries + 20 * kPanel,
                            8 * entries + kTall * (4 * 8192.0 * 8192 + 4 * (6 * 3 + 1) * kPanel)));
  // What needs H whole is not spread.
  config.quantization.asymmetric.correction = "gptaq";
  EXPECT_FALSE(Job(config, model, cluster, 4, 1).is_spread(8192));
  EXPECT_GT(solver_bytes(4), 4 * 8192.0 * 8192);
}

TEST(Memory, DevicesHoldTheRowsInWork) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  Cluster cluster = instant_cluster();
  const auto held = [&] {
    for (const auto& found : quantize_memory(Job(config, model, cluster, 1, 1), 0).items)
      if (found.name == "H, factors and rows") return found.device_bytes;
    return -1.0;
  };
  cluster.device = "cuda";
  cluster.memory.device_gib = 1;
  // down, 8 rows of 16 channels: the weights in bf16, and three copies in f32; a panel of the factor, 16 x
  // 16, beside the factor itself; more than its H, 1024 bytes, with partial sums on two levels. gate and up:
  // the same 14 bytes a weight of one, and of the other the weight, its error and its code; both have
  // factors.
  const auto down = [](double copies) { return copies * 128 + 2 * 4 * 256; };
  const auto gate_up = [](double copies, double rest) { return (copies + rest) * 128 + 3 * 4 * 64; };
  EXPECT_EQ(held(), std::max(down(2 + 3 * 4), gate_up(2 + 3 * 4, 2 + 5)));
  // In f32 the weights are one of the three.
  config.compute_dtype = "float32";
  EXPECT_EQ(held(), std::max(down(3 * 4), gate_up(3 * 4, 4 + 5)));
  // A refinement starts when the copies are gone: all 8 columns of gate and up are one slab, which stands
  // there with its transpose and its H, and five times their 32 rows.
  config.quantization.refinement.sweeps = 1;
  EXPECT_EQ(held(), (4 + 5) * 256.0 + 4 * 3 * 64 + 5 * 4 * 256 + 2 * 4 * 64);
  // Corrected: W C and the target instead of the weights, two factors each, and a panel of C.
  config.quantization.asymmetric = {.correction = "qep", .residual = 0};
  EXPECT_EQ(held(), (8 + 5) * 256.0 + 4 * 3 * 64 + 5 * 4 * 256 + 5 * 4 * 64);
  config.quantization.refinement.sweeps = 0;
  config.quantization.asymmetric.correction = "none";
  // A wide covariance is shared by units one after another: the rows of one module.
  config.compute_dtype = "bfloat16";
  model::ModelConfig wide = model;
  wide.d_ff = 8192;
  const Job job(config, wide, cluster, 1, 1);
  for (const auto& found : quantize_memory(job, 0).items) {
    if (found.name != "H, factors and rows") continue;
    constexpr double kPanel = 384.0 * 8192, kEntries = 384.0 * 384 * (21 * 22 / 2) + 128.0 * 8192;
    // Six panels and their partial sums on two levels; the f64 triangle, and of one panel f64 twice and f32;
    // or the factor, two panels of it, and the rows.
    constexpr double kSums = 4 * 6 * (1 + 2) * kPanel, kFactor = 8 * kEntries + 20 * kPanel,
                     kRows = 14.0 * 8 * 8192 + 2 * 4 * kPanel + 4 * kEntries;
    EXPECT_EQ(found.device_bytes, std::max({kSums, kFactor, kRows}));
  }
}

TEST(Memory, ReestimationHoldsWhatQuantizeAndMeasureHold) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "bfloat16";
  const Cluster cluster = instant_cluster();
  const auto item = [](const RankMemory& memory, const std::string& name) {
    for (const auto& found : memory.items)
      if (found.name == name) return found;
    return RankMemory::Item{"missing", -1, -1};
  };
  EXPECT_FALSE(Job(config, model, cluster, 2, 1).reestimates());
  config.quantization.reestimate = {.policy = "every", .blocks = 1};
  const Job job(config, model, cluster, 2, 1);
  EXPECT_TRUE(job.reestimates());
  constexpr double kState = 5 * 8 * 2;
  const RankMemory first = reestimation_memory(job, 0), last = reestimation_memory(job, 1);
  // Blocks 1 to 3: one of the first stage's two.
  EXPECT_EQ(item(first, "weights").device_bytes, item(measure_memory(job, 0), "weights").device_bytes);
  EXPECT_EQ(item(first, "in flight").device_bytes, 2 * 1 * kState);
  EXPECT_EQ(item(last, "in flight").device_bytes, 1 * (2 + 1) * kState);
  EXPECT_DOUBLE_EQ(item(first, "D").host_bytes, (1 + 8.0 / 7) * 4 * 7 * 20);
  // Of quantize: two of the four sequences, the next block, codes of the last one.
  for (const RankMemory& memory : {first, last}) {
    EXPECT_EQ(item(memory, "hidden states of quantize").device_bytes, 2 * kState);
    EXPECT_EQ(item(memory, "hidden states of quantize").host_bytes, 0);  // nothing is copied on the host
    EXPECT_EQ(item(memory, "next block").device_bytes, 2 * (576 + 16));
    EXPECT_EQ(item(memory, "codes of the last block").host_bytes, 576);
    EXPECT_EQ(item(memory, "outputs of the original").device_bytes, 0);
  }
  EXPECT_EQ(item(first, "block left").device_bytes, -1);

  // A pass over the last stage alone: the first one waits.
  config.quantization.reestimate.blocks = 2;
  EXPECT_EQ(item(reestimation_memory(job, 0), "in flight").device_bytes, -1);
  EXPECT_EQ(item(reestimation_memory(job, 1), "buffers").device_bytes, 0);
  EXPECT_EQ(item(reestimation_memory(job, 1), "in flight").device_bytes, 1 * (2 + 1) * kState);

  // A device's hidden states are copied for the stage that enters.
  Cluster devices = cluster;
  devices.device = "cuda";
  EXPECT_EQ(
      item(reestimation_memory(Job(config, model, devices, 2, 1), 0), "hidden states of quantize").host_bytes,
      2 * kState);
  EXPECT_EQ(
      item(reestimation_memory(Job(config, model, devices, 1, 2), 0), "hidden states of quantize").host_bytes,
      0);

  // Loss kl: outputs of the original for all four sequences of the replica, from then on.
  config.quantization.reestimate.loss = "kl";
  EXPECT_EQ(item(reestimation_memory(job, 0), "outputs of the original").device_bytes, 0);
  EXPECT_EQ(item(reestimation_memory(job, 1), "outputs of the original").device_bytes, 4 * kState);
  EXPECT_EQ(item(quantize_memory(job, 1), "outputs of the original").device_bytes, 4 * kState);
  // Tracking keeps those of its sequences alone, one of the four.
  config::RunConfig tracking = config;
  tracking.quantization.reestimate = {.probe_sequences = 1, .track = true};
  EXPECT_EQ(
      item(quantize_memory(Job(tracking, model, cluster, 2, 1), 1), "outputs of the original").device_bytes,
      kState);
  // Logits of both models, and by ATen the f32 temporaries of their comparison.
  EXPECT_EQ(item(reestimation_memory(job, 1), "backward").device_bytes, 256 * 32 * (2 * 2 + 28) + 2 * 80);

  // The original stream has its own hidden states, and the weights of the block that it left.
  config.quantization.asymmetric.correction = "qep";
  EXPECT_EQ(item(reestimation_memory(job, 1), "hidden states of quantize").device_bytes, 2 * 2 * kState);
  EXPECT_EQ(item(reestimation_memory(job, 1), "block left").device_bytes, 2 * (576 + 16));
}

TEST(Memory, TheNeedCountsReestimation) {
  model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.compute_dtype = "float32";
  config.ranks.activation_gib = 0;
  // Long sequences: measure holds the most, and of its four blocks' D three come on top of what quantize
  // holds.
  config.calibration.length = model.max_position = 4096;
  const Cluster cluster = instant_cluster();
  const auto need = [&] { return memory_need(Job(config, model, cluster, 1, 1)); };
  const double once = need().node_bytes;
  EXPECT_EQ(need().node_stage, "measure");
  config.quantization.reestimate = {.policy = "every", .blocks = 1, .loss = "kl"};
  EXPECT_EQ(need().node_stage, "re-estimation");
  EXPECT_GT(need().node_bytes, once);
  // Without a block behind the first interval nothing is measured again.
  config.quantization.reestimate.blocks = 4;
  EXPECT_EQ(need().node_bytes, once);
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
