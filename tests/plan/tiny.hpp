#pragma once
#include <isobath/plan/job.hpp>

namespace isobath::plan {

/// Small enough to count by hand: q 8x8, k and v 4x8, o 8x8, gate and up 16x8, down 8x16: 576 weights a
/// block.
inline model::ModelConfig tiny_model() {
  model::ModelConfig model;
  model.architecture = "LlamaForCausalLM";
  model.vocab_size = 32;
  model.d_model = 8;
  model.d_ff = 16;
  model.n_blocks = 4;
  model.n_heads = 2;
  model.n_kv_heads = 1;
  model.head_dim = 4;
  model.max_position = 64;
  return model;
}
/// Nothing takes time; tests slow down what they look at. One rank on one node.
inline Cluster instant_cluster() {
  constexpr double kInstant = 1e30;
  Cluster cluster;
  cluster.name = "instant";
  cluster.memory.node_gib = 64;
  cluster.compute = {.bf16_tflops = kInstant,
                     .f32_tflops = kInstant / 2,
                     .covariance_tflops = 0,
                     .attention_tflops = kInstant,
                     .memory_gbs = kInstant,
                     .operation_us = 0,
                     .host_link_gbs = kInstant};
  cluster.host = {.threads = 1,
                  .f64_factor_tflops = kInstant,
                  .f64_gemm_tflops = kInstant,
                  .f32_thin_tflops = kInstant,
                  .column_gflops = kInstant,
                  .candidate_gps = kInstant,
                  .pack_gps = kInstant,
                  .memory_gbs = kInstant};
  cluster.rows = {.f64_factor_tflops = kInstant,
                  .f64_gemm_tflops = kInstant,
                  .product_tflops = kInstant,
                  .column_us = 0,
                  .refined_column_us = 0,
                  .candidate_gps = kInstant};
  cluster.network = {kInstant, kInstant, kInstant, kInstant, 0};
  cluster.filesystem = {kInstant, kInstant, kInstant, kInstant};
  return cluster;
}

/// 4 sequences of 5 tokens in 2 logical shards; no probes, and plain weighted GPTQ.
inline config::RunConfig tiny_config() {
  config::RunConfig config;
  config.model = "tiny";
  config.calibration = {.tokens = {}, .sequences = 4, .length = 5, .microbatch = 1, .logical_shards = 2};
  config.sensitivity.per_sequence = "off";
  config.sensitivity.shrinkage = 0;
  config.quantization.refinement.sweeps = 0;
  config.quantization.asymmetric.correction = "none";
  config.quantization.group = 0;
  return config;
}

}  // namespace isobath::plan
