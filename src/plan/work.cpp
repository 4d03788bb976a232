#include <isobath/plan/work.hpp>

namespace isobath::plan {
namespace {

using model::Projection;

constexpr double kTera = 1e12, kGiga = 1e9, kMicro = 1e-6;

// Elementwise passes, counted in src/model/block.cpp as bytes read + written a channel, e = bytes of an
// element. rms_norm: to f32 e+4, square 8, mean 4, scale 8, back 4+e, times the weight 2e.
double norm_bytes(double e) {
  return 24 + 4 * e;
}
// rotate: x·cos 2e, rotate_half 3e, ·sin 2e, sum 3e.
double rotary_bytes(double e) {
  return 10 * e;
}
// silu 2e, product 3e.
double gated_bytes(double e) {
  return 5 * e;
}

// Each elementwise operation of the forward has one in the backward that reads the gradient and what was
// saved and writes a gradient: about twice the forward's bytes.
constexpr double kBackwardTraffic = 2;

// Operations started: two norms (7 each), seven linears, two rotations (7 each), attention 1, and the
// residuals, views and the gate 6; the backward starts about twice as many; BlockObserver 20 a linear.
constexpr double kForwardOperations = 42, kBackwardOperations = 84, kObserverOperations = 20;

// GPTQ's blocks of columns (quant/solver.cpp).
constexpr double kColumnBlock = 128;

// quant::factorize, bytes a channel pair: check 4, to f64 12, two index_selects 32, two masks 32, two flips
// 32, identity 8, to f32 12.
constexpr double kFactorTraffic = 132;

// Covariance::value: two triangles (8 each), their sum 12, and the next shard's zeros 4.
constexpr double kValueTraffic = 32;

struct Linear {
  double rows, columns;
};
Linear linear_of(const model::ModelConfig& model, int p) {
  const auto shape = model::module_shape(model, static_cast<Projection>(p));
  return {static_cast<double>(shape.rows), static_cast<double>(shape.columns)};
}

}  // namespace

Work& Work::operator+=(const Work& other) {
  gemm_flops += other.gemm_flops;
  f32_flops += other.f32_flops;
  attention_flops += other.attention_flops;
  traffic_bytes += other.traffic_bytes;
  n_operations += other.n_operations;
  host_link_bytes += other.host_link_bytes;
  f64_factor_flops += other.f64_factor_flops;
  f64_gemm_flops += other.f64_gemm_flops;
  thin_flops += other.thin_flops;
  column_flops += other.column_flops;
  candidates += other.candidates;
  packed_codes += other.packed_codes;
  host_traffic_bytes += other.host_traffic_bytes;
  return *this;
}

Work operator*(double factor, const Work& work) {
  return {.gemm_flops = factor * work.gemm_flops,
          .f32_flops = factor * work.f32_flops,
          .attention_flops = factor * work.attention_flops,
          .traffic_bytes = factor * work.traffic_bytes,
          .n_operations = factor * work.n_operations,
          .host_link_bytes = factor * work.host_link_bytes,
          .f64_factor_flops = factor * work.f64_factor_flops,
          .f64_gemm_flops = factor * work.f64_gemm_flops,
          .thin_flops = factor * work.thin_flops,
          .column_flops = factor * work.column_flops,
          .candidates = factor * work.candidates,
          .packed_codes = factor * work.packed_codes,
          .host_traffic_bytes = factor * work.host_traffic_bytes};
}

double seconds(const Work& work, const Cluster& cluster, bool computes_bf16) {
  const Cluster::Compute& c = cluster.compute;
  const Cluster::Host& h = cluster.host;
  const Cluster::Efficiency& e = cluster.efficiency;
  const double gemm_rate = kTera * (computes_bf16 ? c.bf16_tflops * e.gemm : c.f32_tflops * e.f32_gemm);
  double total = work.gemm_flops / gemm_rate + work.f32_flops / (kTera * c.f32_tflops * e.f32_gemm) +
                 work.attention_flops / (kTera * c.attention_tflops * e.attention) +
                 work.traffic_bytes / (kGiga * c.memory_gbs * e.memory) +
                 work.n_operations * c.operation_us * kMicro;
  if (cluster.has_devices()) total += work.host_link_bytes / (kGiga * c.host_link_gbs * e.memory);
  total += work.f64_factor_flops / (kTera * h.f64_factor_tflops * e.host) +
           work.f64_gemm_flops / (kTera * h.f64_gemm_tflops * e.host) +
           work.thin_flops / (kTera * h.f32_thin_tflops * e.host) +
           work.column_flops / (kGiga * h.column_gflops) + work.candidates / (kGiga * h.candidate_gps) +
           work.packed_codes / (kGiga * h.pack_gps) +
           work.host_traffic_bytes / (kGiga * h.memory_gbs * e.memory);
  return total;
}

Shapes Shapes::of(const model::ModelConfig& model, bool computes_bf16) {
  Shapes shapes{.model = &model,
                .element_bytes = computes_bf16 ? 2.0 : 4.0,
                .d = static_cast<double>(model.d_model),
                .f = static_cast<double>(model.d_ff),
                .d_query = static_cast<double>(model.n_heads * model.head_dim),
                .d_key = static_cast<double>(model.n_kv_heads * model.head_dim),
                .vocabulary = static_cast<double>(model.vocab_size),
                .n_blocks = static_cast<double>(model.n_blocks),
                .block_linears = 0};
  for (int p = 0; p < model::kProjections; ++p)
    shapes.block_linears += linear_of(model, p).rows * linear_of(model, p).columns;
  return shapes;
}

double Shapes::block_weight_bytes() const {
  double biases = 0;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto shape = model::module_shape(*model, static_cast<Projection>(p));
    if (shape.has_bias) biases += static_cast<double>(shape.rows);
  }
  return element_bytes * (block_linears + 2 * d + biases);
}

double Shapes::end_weight_bytes() const {
  return element_bytes * vocabulary * d;
}

Work forward_block(const Shapes& s, double n_tokens, double length) {
  const double e = s.element_bytes;
  const double bytes_per_token = 2 * norm_bytes(e) * s.d + 2 * 3 * e * s.d +
                                 rotary_bytes(e) * (s.d_query + s.d_key) + 2 * e * s.d_query +
                                 gated_bytes(e) * s.f;
  return {.gemm_flops = 2 * n_tokens * s.block_linears,
          // 4 T d_query a token for scores and mixed values, half of it above the diagonal.
          .attention_flops = 2 * n_tokens * length * s.d_query,
          .traffic_bytes = n_tokens * bytes_per_token,
          .n_operations = kForwardOperations};
}

Work backward_block(const Shapes& s, double n_tokens, double length, const config::Sensitivity& sensitivity) {
  const Work forward = forward_block(s, n_tokens, length);
  const double e = s.element_bytes, samples = static_cast<double>(sensitivity.samples);
  const Work backward{.gemm_flops = forward.gemm_flops,
                      .attention_flops = 2.5 * forward.attention_flops,
                      .traffic_bytes = kBackwardTraffic * forward.traffic_bytes,
                      .n_operations = kBackwardOperations};
  Work recorded;
  for (int p = 0; p < model::kProjections; ++p) {
    const Linear w = linear_of(*s.model, p);
    // ChannelStatistics::observe: x to f32 and squared e+12, Σ 4, max 4; ‖G‖² e; token_weights: G once more.
    double bytes = (e + 20) * w.columns + 2 * e * w.rows;
    double flops = 4 * w.columns;
    if (sensitivity.per_sequence != "off") {
      bytes += (e + 8) * (w.columns + w.rows);  // f32 copies of x and G, read by the products
      flops += sensitivity.per_sequence == "exact"
                   ? 2 * w.columns * w.rows
                   : 2 * static_cast<double>(sensitivity.probes) * (w.columns + w.rows);
    }
    recorded += {.f32_flops = n_tokens * flops,
                 .traffic_bytes = n_tokens * bytes,
                 .n_operations = kObserverOperations};
  }
  Work total = forward + samples * (backward + recorded);
  if (sensitivity.covariance)
    for (int p = 0; p < model::kProjections; ++p)
      total += static_cast<double>(sensitivity.row_groups) *
               covariance_add(s, n_tokens, linear_of(*s.model, p).columns);
  return total;
}

Work head_loss(const Shapes& s, double n_tokens, double samples) {
  const double e = s.element_bytes, logits = n_tokens * s.vocabulary;
  // logits e, to f32 e+4, log_softmax 12, exp 8; a sample: clone 8, back to e 4+e, read by the product e.
  return {.gemm_flops = (1 + samples) * 2 * logits * s.d,
          .traffic_bytes = logits * ((2 * e + 24) + samples * (12 + 2 * e)) +
                           n_tokens * s.d * (1 + samples) * norm_bytes(e)};
}

Work head_compare(const Shapes& s, double n_tokens, int n_models) {
  const double e = s.element_bytes, logits = n_tokens * s.vocabulary;
  // logits e, to f32 e+4, log_softmax 12 a model; argmax 4 each, exp 8, difference 12, product 12, sum 4.
  return {.gemm_flops = n_models * 2 * logits * s.d,
          .traffic_bytes = logits * (n_models * (2 * e + 16) + (n_models > 1 ? 44 : 0))};
}

double panel_width(double d) {
  return d <= 1024 ? 128 : 256;
}

Work covariance_add(const Shapes& s, double n_rows, double d) {
  // to f32 e+4, times √D 8, mask 8, finite? 8.
  return {.f32_flops = n_rows * d * (d + panel_width(d)),
          .traffic_bytes = n_rows * d * (s.element_bytes + 28),
          .n_operations = 8 + d / panel_width(d)};
}

Work covariance_close(double d) {
  return {.traffic_bytes = kValueTraffic * d * d, .n_operations = 6, .host_link_bytes = 4 * d * d};
}

Work factorize(double d) {
  return {.f64_factor_flops = 4.0 / 3.0 * d * d * d, .host_traffic_bytes = kFactorTraffic * d * d};
}

double candidate_grids(int bits, bool symmetric, bool clip_search) {
  if (!clip_search) return 1;
  const double octaves = bits == 2 ? 2.5 : bits == 3 ? 2.0 : bits == 4 ? 1.25 : 1.0;
  // At most six rounds of refinement follow, each a least-squares pass and one candidate (asymmetric: three);
  // the search ends when a round changes nothing, and three are counted.
  constexpr double kRounds = 3, kZeros = 9;
  return symmetric ? octaves * 64 + 2 + kRounds * 2 : (octaves * 32 + 3) * kZeros + 1 + kRounds * 4;
}

Work solve_rows(double n_rows, double d, const config::Quantization& q) {
  const double tiles = std::ceil(n_rows / 64);
  const double rows = 64 * tiles;
  return {.thin_flops = rows * d * std::max(0.0, d - kColumnBlock),
          .column_flops = rows * d * kColumnBlock,
          .candidates = rows * d * candidate_grids(q.bits, q.symmetric, q.clip_search),
          .host_traffic_bytes = 16 * rows * d};
}

Work score(double n_rows, double d, const config::Quantization& q, double threads) {
  // Each objective turns W, Ŵ and H to f64: 12 and 8 bytes, differences 24, product 24.
  return {.f64_gemm_flops = 4 * n_rows * d * d,
          .candidates = n_rows * d * candidate_grids(q.bits, q.symmetric, q.clip_search) / threads,
          .host_traffic_bytes = 2 * (72 * n_rows * d + 12 * d * d)};
}

}  // namespace isobath::plan
