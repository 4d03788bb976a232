#include <gtest/gtest.h>

#include <cmath>

#include <isobath/plan/work.hpp>

#include "src/quant/candidates.hpp"
#include "tests/plan/tiny.hpp"

namespace isobath::plan {
namespace {

TEST(Work, ForwardOfABlockByHand) {
  const model::ModelConfig model = tiny_model();
  const Shapes shapes = Shapes::of(model, true, false);
  EXPECT_EQ(shapes.block_linears, 64 + 32 + 32 + 64 + 128 + 128 + 128);
  // bf16: 576 linears and two norms of 8.
  EXPECT_EQ(shapes.block_weight_bytes(), 2 * (576 + 16));
  EXPECT_EQ(shapes.end_weight_bytes(), 2 * 32 * 8);

  const Work work = forward_block(shapes, 10, 5);
  EXPECT_EQ(work.gemm_flops, 2 * 10 * 576);
  // Scores and mixed values: 2 · 2 · T · d_query a token, half of it causal.
  EXPECT_EQ(work.attention_flops, 10 * (2 * 2 * 5 * 8) / 2);
  // Norms 2·32·8, residuals 2·6·8, rotation 20·(8+4), heads back 4·8, gate 10·16.
  EXPECT_EQ(work.traffic_bytes, 10 * (512 + 96 + 240 + 32 + 160));
  EXPECT_EQ(work.f32_flops, 0);

  // One pass each: norms 2·6·8, residuals 2·6·8, gate 6·16; the rotation is attention's.
  const Work kernels = forward_block(Shapes::of(model, true, true), 10, 5);
  EXPECT_EQ(kernels.gemm_flops, work.gemm_flops);
  EXPECT_EQ(kernels.attention_flops, work.attention_flops);
  EXPECT_EQ(kernels.traffic_bytes, 10 * (96 + 96 + 96));
}

TEST(Work, BackwardHasNoWeightGradients) {
  const model::ModelConfig model = tiny_model();
  const Shapes shapes = Shapes::of(model, true, false);
  config::Sensitivity sensitivity;
  sensitivity.per_sequence = "off";

  const Work one = backward_block(shapes, 10, 5, sensitivity);
  EXPECT_EQ(one.gemm_flops, 2 * 10 * 576);
  EXPECT_EQ(one.attention_flops, 3.5 * 800);
  // Norms 2·(32+108)·8, gate (10+126)·16, sums and the stack 8·2·8, attention's copies 3·(20·12+4·8);
  // recorded 22 for each of 64 inputs and 4 for each of 64 outputs.
  constexpr double kRecorded = 22 * 64 + 4 * 64;
  EXPECT_EQ(one.traffic_bytes, 10 * (2240 + 2176 + 128 + 816 + kRecorded));
  // Norms 2·(6+14)·8, gate (6+10)·16.
  const Work kernels = backward_block(Shapes::of(model, true, true), 10, 5, sensitivity);
  EXPECT_EQ(kernels.attention_flops, 2.5 * 800);
  // Recorded: each input once and each output twice.
  EXPECT_EQ(kernels.traffic_bytes, 10 * (320 + 256 + 128 + 2 * 64 + 4 * 64));
  // Two sums over the rows of x²: five linears of 8 channels, o of 8, down of 16.
  EXPECT_EQ(one.f32_flops, 10 * 4 * (5 * 8 + 8 + 16));

  sensitivity.samples = 3;
  EXPECT_EQ(backward_block(shapes, 10, 5, sensitivity).gemm_flops, 3 * (2 * 10 * 576));

  sensitivity.samples = 1;
  sensitivity.per_sequence = "probes";
  sensitivity.probes = 8;
  // Eight probes times G (rows: 8+4+4+8+16+16+8) and times X.
  EXPECT_EQ(backward_block(shapes, 10, 5, sensitivity).f32_flops, one.f32_flops + 10 * 2 * 8 * (64 + 64));
  sensitivity.per_sequence = "exact";
  EXPECT_EQ(backward_block(shapes, 10, 5, sensitivity).f32_flops, one.f32_flops + 10 * 2 * 576);

  sensitivity.per_sequence = "off";
  sensitivity.covariance = true;
  EXPECT_EQ(backward_block(shapes, 10, 5, sensitivity).f32_flops,
            one.f32_flops + 10 * (6 * 8 * (8 + 128) + 16 * (16 + 128)));
  EXPECT_EQ(backward_block(Shapes::of(model, true, true), 10, 5, sensitivity).covariance_flops,
            10 * (6 * 8 * (8 + 48) + 16 * (16 + 48)));
}

TEST(Work, ScoringWidthsByHand) {
  const model::ModelConfig model = tiny_model();
  config::RunConfig config = tiny_config();
  config.sensitivity.gram_bits = {2, 4};
  config.sensitivity.probes = 3;
  const Shapes shapes = Shapes::of(model, true, true);

  const Work work = score_widths(shapes, 10, 5, config.sensitivity);

  EXPECT_EQ(work.gemm_flops, 2 * 10 * 576);
  // Two widths, three signs: ΔWᵀr of two sequences, and of ten tokens what comes out of it (columns: 6 · 8 +
  // 16).
  EXPECT_EQ(work.f32_flops, 2 * 2 * 3 * (2 * 576 + 10 * 64));
  // bf16. GᵀX 2 and 6 to f32, 12; a width 20; W to f32 6 and rounding 56.
  EXPECT_EQ(work.traffic_bytes, 576 * (2 * (20 + 2 * 20) + 2 * 62));
  config.sensitivity.samples = 3;
  EXPECT_EQ(score_widths(shapes, 10, 5, config.sensitivity).traffic_bytes, 3 * work.traffic_bytes);

  // Of checkpoints the change is read, not made, and no grid is fitted.
  config.sensitivity.samples = 1;
  EXPECT_EQ(score_grids(shapes, config, 2).candidates,
            576 * (candidate_grids(2, true, true) + candidate_grids(4, true, true)) / 2);
  config.sensitivity.gram_checkpoints = {"a", "b"};
  EXPECT_EQ(score_widths(shapes, 10, 5, config.sensitivity).traffic_bytes, 576 * (2 * 60 + 2 * 24));
  EXPECT_EQ(score_grids(shapes, config, 2).candidates, 0);
  // A tile of 512 rows of the widest input: GᵀX of one sequence, and three more.
  EXPECT_EQ(score_bytes(shapes, 1), 4 * 512 * 16 * 4);
}

TEST(Work, HeadsByHand) {
  const model::ModelConfig model = tiny_model();
  const Shapes shapes = Shapes::of(model, true, false);
  // Logits, and (p − y) W for each of two samples.
  config::Sensitivity sensitivity;
  sensitivity.samples = 2;
  EXPECT_EQ(head_loss(shapes, 10, sensitivity).gemm_flops, 3 * 2 * 10 * 32 * 8);
  EXPECT_EQ(head_compare(shapes, 10).gemm_flops, 2 * 2 * 10 * 32 * 8);

  // bf16 kernels: logits written, read twice, probabilities written; p − y in their place, read by the
  // product. A norm of 10 x 8 and its gradient.
  const Shapes kernels = Shapes::of(model, true, true);
  sensitivity.samples = 1;
  EXPECT_EQ(head_loss(kernels, 10, sensitivity).traffic_bytes, 320 * (2 + 6 + 2) + 80 * (6 + 14));
  EXPECT_EQ(head_loss(shapes, 10, sensitivity).traffic_bytes, 320 * (2 + 52 + 2) + 80 * (32 + 108));
  // Labels are drawn from f32 probabilities on every device.
  sensitivity.loss = "fisher";
  EXPECT_EQ(head_loss(kernels, 10, sensitivity).traffic_bytes, 320 * (2 + 58 + 8) + 80 * (6 + 14));
  // Two models' logits written and read twice each.
  EXPECT_EQ(head_compare(kernels, 10).traffic_bytes, 320 * (2 * 2 + 2 * 4) + 2 * 80 * 6);
  EXPECT_EQ(head_compare(shapes, 10).traffic_bytes, 320 * (2 * 2 + 2 * 20 + 36) + 2 * 80 * 32);
}

TEST(Work, SolverByHand) {
  const model::ModelConfig model = tiny_model();
  const Shapes shapes = Shapes::of(model, true, false);
  // The upper triangle in panels of 128, or of 256 above 1024 channels.
  EXPECT_EQ(covariance_add(shapes, 10, 512).f32_flops, 10.0 * 512 * (512 + 128));
  EXPECT_EQ(covariance_add(shapes, 10, 2048).f32_flops, 10.0 * 2048 * (2048 + 256));
  // Tiles of 48 channels on and above the diagonal.
  const Shapes kernels = Shapes::of(model, true, true);
  EXPECT_EQ(covariance_add(kernels, 10, 480).covariance_flops, 10.0 * 2 * 48 * 48 * (10 * 11 / 2));
  EXPECT_EQ(covariance_add(kernels, 10, 480).f32_flops, 0);
  EXPECT_EQ(cross_covariance_add(kernels, 10, 480).covariance_flops, 10.0 * 2 * 480 * 480);
  EXPECT_EQ(cross_covariance_add(shapes, 10, 480).f32_flops, 10.0 * 2 * 480 * 480);
  EXPECT_EQ(factorize(3).f64_factor_flops, 9);
  // Panels of 384 and 128 columns, in steps of 128: four small Cholesky factorizations, and a solve of what
  // stands above each; products within the wide panel, and the narrow one's share of it.
  constexpr double kStep = 128, kSquare = kStep * kStep, kCube = kSquare * kStep;
  EXPECT_DOUBLE_EQ(factorize(512).f64_factor_flops, 4 * kCube / 3 + (384 + 256 + 128) * kSquare);
  EXPECT_DOUBLE_EQ(factorize(512).f64_gemm_flops, 2 * kCube * (4 + 1) + 2 * 384.0 * 384 * 128);
  EXPECT_EQ(panel_entries(512), 384 * 384 + 512 * 128);
  // Of many panels, four ranks subtract a fourth each: d³/3 comes near a fourth of itself.
  EXPECT_LT(factorize_spread(16384, 4).f64_gemm_flops, 0.3 * factorize(16384).f64_gemm_flops);
  EXPECT_NEAR(factorize(16384).f64_gemm_flops / (std::pow(16384.0, 3) / 3), 1, 0.05);

  config::Quantization quantization;
  quantization.clip_search = false;
  // 70 rows are two tiles of 64; the last 128 of 256 columns are reached by the product.
  const Work rows = solve_rows(70, 256, quantization, 64, 1);
  EXPECT_EQ(rows.thin_flops, 128.0 * 256 * 128);
  EXPECT_EQ(rows.column_flops, 128.0 * 256 * 128);
  EXPECT_EQ(rows.candidates, 128.0 * 256);
  // Four tiles on three threads: one of them has two. Products are counted whole.
  const Work shared = solve_rows(256, 256, quantization, 64, 3);
  EXPECT_EQ(shared.thin_flops, 256.0 * 256 * 128);
  EXPECT_EQ(shared.column_flops, 128.0 * 256 * 128);
  EXPECT_EQ(shared.candidates, 128.0 * 256);
  // One tile of 256 rows is one thread's.
  EXPECT_EQ(solve_rows(256, 256, quantization, 256, 3).candidates, 256.0 * 256);
  // A product with the factor's panel, of every row; with H too when the codes changed.
  EXPECT_EQ(score(10, 16, quantization, 4, false).thin_flops, 2 * 10 * 16 * 16);
  EXPECT_EQ(score(10, 16, quantization, 4, true).thin_flops, 3 * 10 * 16 * 16);
  EXPECT_EQ(score(10, 16, quantization, 4, false).candidates, 10.0 * 16 / 4);
  // 1024 rows are 16 tiles, of which one is judged.
  EXPECT_EQ(score(1024, 4096, quantization, 1, false).candidates, 64.0 * 4096);
}

TEST(Work, RefinementAndCorrectionByHand) {
  config::Quantization quantization;
  quantization.refinement.sweeps = 2;
  quantization.group = 64;
  // Half of a product to load; a sweep takes the gradient and updates the errors, the gradient within the
  // slab after codes and after grids, and multiplies each group's own H three times, seven where zero points
  // move. 512 columns are a slab of 384 and one of 128.
  EXPECT_EQ(slab_columns(512, quantization), 384);
  EXPECT_EQ(refine_slabs(512, quantization).thin_flops, 2 * 384.0 * 512 * 512);
  EXPECT_EQ(refine_rows(70, 512, quantization, 1).thin_flops,
            2.0 * 128 * 512 * (256 + 2 * (512 + 2 * 384 + 3 * 64)));
  EXPECT_EQ(refine_rows(70, 256, quantization, 1).thin_flops,
            2.0 * 128 * 256 * (128 + 2 * (256 + 2 * 256 + 3 * 64)));
  EXPECT_EQ(refine_rows(70, 256, quantization, 1).column_flops, 2 * 128.0 * 256 * 128);
  quantization.symmetric = false;
  EXPECT_EQ(refine_rows(70, 256, quantization, 1).thin_flops,
            2.0 * 128 * 256 * (128 + 2 * (256 + 2 * 256 + 7 * 64)));

  EXPECT_EQ(gptaq_correction(3).f64_factor_flops, 2 * 27);
  // W C, and two substitutions in the factor or W M.
  EXPECT_EQ(correct_rows(64, 16).thin_flops, 2 * 2 * 64 * 16 * 16);
}

TEST(Work, CandidatesAreThoseOfTheSearch) {
  for (const int bits : {2, 3, 4, 8}) {
    const auto n = static_cast<double>(quant::shrink_factors({.bits = bits, .symmetric = true}).size());
    // The min-max grid comes first; three rounds of refinement follow, of two passes each.
    EXPECT_EQ(candidate_grids(bits, true, true), 1 + n + 6) << bits;
    const auto m = static_cast<double>(quant::shrink_factors({.bits = bits, .symmetric = false}).size());
    EXPECT_EQ(candidate_grids(bits, false, true), 1 + m * quant::kMaxZeros + 12) << bits;
    EXPECT_EQ(candidate_grids(bits, true, false), 1);
  }
}

TEST(Work, EachPartTakesItsOwnRate) {
  Cluster cluster = instant_cluster();
  cluster.compute.bf16_tflops = 2;
  cluster.efficiency.gemm = 0.5;
  EXPECT_DOUBLE_EQ(seconds({.gemm_flops = 3e12}, cluster, true), 3);
  EXPECT_LT(seconds({.gemm_flops = 3e12}, cluster, false), 1e-9);  // f32 is instant here
  cluster.host.f64_factor_tflops = 4;
  cluster.efficiency.host = 0.25;
  EXPECT_DOUBLE_EQ(seconds({.f64_factor_flops = 5e12}, cluster, true), 5);
  cluster.compute.covariance_tflops = 2;
  cluster.efficiency.covariance = 0.5;
  EXPECT_DOUBLE_EQ(seconds({.covariance_flops = 3e12}, cluster, true), 3);
  cluster.compute.operation_us = 10;
  EXPECT_DOUBLE_EQ(seconds({.n_operations = 100}, cluster, true), 1e-3);
  cluster.compute.host_link_gbs = 1;
  EXPECT_EQ(seconds({.host_link_bytes = 1e9}, cluster, true), 0);  // no devices: nothing to copy
  cluster.device = "cuda";
  EXPECT_DOUBLE_EQ(seconds({.host_link_bytes = 1e9}, cluster, true), 1);
}

}  // namespace
}  // namespace isobath::plan
