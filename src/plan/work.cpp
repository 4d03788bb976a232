#include <isobath/plan/work.hpp>

#include <isobath/quant/row_solver.hpp>
#include <isobath/quant/slab.hpp>
#include <utility>

namespace isobath::plan {
namespace {

using model::Projection;

constexpr double kTera = 1e12, kGiga = 1e9, kMicro = 1e-6;

// Operations started. Kernels: two norms, seven linears, attention with its tables 5, gate, residuals and
// views 5; backward: what the linears saw 3, gradients of norms, gate and attention 8, seven linears, sums 5.
// ATen: two norms (7 each), seven linears, two rotations (7 each), attention 1, residuals, views and gate 6;
// backward: norms 14 + 32, gate 18, attention again and its gradients 48, seven linears, sums 4.
// StatisticsObserver 20 a linear.
constexpr double kForwardOperations = 20, kBackwardOperations = 23, kAtenForwardOperations = 42,
                 kAtenBackwardOperations = 123, kObserverOperations = 20;

// GPTQ's blocks of columns (quant/solver.cpp).
constexpr double kColumnBlock = 128;

// quant::factorize, bytes an entry of the triangle: check 4 (twice: of both triangles), to f64 12, two masks
// 32, divided 16, to f32 12, check 4, and the product's passes over what it is subtracted from, 16 a panel.
constexpr double kFactorTraffic = 84;

// gptaq: the root from f32 20, C to f64 12, four index_selects 64, triu 16, back 12.
constexpr double kGptaqTraffic = 124;

// A weight on its way to an objective: dequantize (codes to f32 5, zero 8, scale 8, to storage 6),
// difference 12, transposed 8, product written and read 8, sums 8.
constexpr double kScoreTraffic = 63;

// pipeline/row_tiles.cpp: tiles of which the rounding of one is judged, from so many channels on.
constexpr double kSampledTiles = 16, kSampledColumns = 4096;

// Columns of a triangular solve (quant/factor.cpp).
constexpr double kFactorStep = 128;

// quant::kRowTile.
constexpr double kTileRows = 64;
double whole_tiles(double n_rows) {
  return std::ceil(n_rows / kTileRows);
}

/// Rows of the busiest thread, whole tiles of `height`.
double busiest_rows(double n_rows, double height, double threads) {
  return height * std::ceil(std::ceil(n_rows / height) / threads);
}

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
  covariance_flops += other.covariance_flops;
  attention_flops += other.attention_flops;
  traffic_bytes += other.traffic_bytes;
  n_operations += other.n_operations;
  host_link_bytes += other.host_link_bytes;
  f64_factor_flops += other.f64_factor_flops;
  f64_gemm_flops += other.f64_gemm_flops;
  thin_flops += other.thin_flops;
  column_flops += other.column_flops;
  columns += other.columns;
  refined_columns += other.refined_columns;
  candidates += other.candidates;
  packed_codes += other.packed_codes;
  host_traffic_bytes += other.host_traffic_bytes;
  return *this;
}

Work operator*(double factor, const Work& work) {
  return {.gemm_flops = factor * work.gemm_flops,
          .f32_flops = factor * work.f32_flops,
          .covariance_flops = factor * work.covariance_flops,
          .attention_flops = factor * work.attention_flops,
          .traffic_bytes = factor * work.traffic_bytes,
          .n_operations = factor * work.n_operations,
          .host_link_bytes = factor * work.host_link_bytes,
          .f64_factor_flops = factor * work.f64_factor_flops,
          .f64_gemm_flops = factor * work.f64_gemm_flops,
          .thin_flops = factor * work.thin_flops,
          .column_flops = factor * work.column_flops,
          .columns = factor * work.columns,
          .refined_columns = factor * work.refined_columns,
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
  if (work.covariance_flops > 0)
    total += work.covariance_flops / (kTera * c.covariance_tflops * e.covariance);
  if (cluster.has_devices()) total += work.host_link_bytes / (kGiga * c.host_link_gbs * e.memory);
  total += work.f64_factor_flops / (kTera * h.f64_factor_tflops * e.host) +
           work.f64_gemm_flops / (kTera * h.f64_gemm_tflops * e.host) +
           work.thin_flops / (kTera * h.f32_thin_tflops * e.host) +
           work.column_flops / (kGiga * h.column_gflops) + work.candidates / (kGiga * h.candidate_gps) +
           work.packed_codes / (kGiga * h.pack_gps) +
           work.host_traffic_bytes / (kGiga * h.memory_gbs * e.memory);
  return total;
}

double seconds_of_rows(const Work& work, const Cluster& cluster, bool computes_bf16) {
  if (!cluster.has_devices()) return seconds(work, cluster, computes_bf16);
  const Cluster::Rows& r = cluster.rows;
  Work others = work;
  others.traffic_bytes += std::exchange(others.host_traffic_bytes, 0);
  others.f64_factor_flops = others.f64_gemm_flops = others.thin_flops = others.column_flops =
      others.candidates = 0;
  return seconds(others, cluster, computes_bf16) + work.f64_factor_flops / (kTera * r.f64_factor_tflops) +
         work.f64_gemm_flops / (kTera * r.f64_gemm_tflops) + work.thin_flops / (kTera * r.product_tflops) +
         work.columns * r.column_us * kMicro + work.refined_columns * r.refined_column_us * kMicro +
         work.candidates / (kGiga * r.candidate_gps);
}

Passes Passes::of(double e, bool has_kernels) {
  // norm: x twice, out. Backward: x three times, the gradient twice, the residual, out.
  if (has_kernels)
    return {.norm = 3 * e,
            .norm_backward = 7 * e,
            .gate = 3 * e,
            .gate_backward = 5 * e,
            .rotary = 0,
            .heads = 0};
  return {// To f32 e+4, square 8, mean 4, scale 8, back 4+e, times the weight 2e.
          .norm = 24 + 4 * e,
          // x to f32 e+4, square 8, mean 4, unit 8; gradient e+4, weighted 8; times unit 12, mean 4, along 8,
          // across 12, scaled 8; residual e+4, sum 12, back 4+e.
          .norm_backward = 100 + 4 * e,
          // silu 2e, product 3e.
          .gate = 5 * e,
          // Gate, up and gradient to f32 e+4 each, sigmoid 8, eight products and sums 88, two back 4+e each.
          .gate_backward = 116 + 5 * e,
          // x·cos 2e, rotate_half 3e, ·sin 2e, sum 3e.
          .rotary = 10 * e,
          .heads = 2 * e};
}

Shapes Shapes::of(const model::ModelConfig& model, bool computes_bf16, bool has_kernels, bool has_gram) {
  const double e = computes_bf16 ? 2.0 : 4.0;
  Shapes shapes{.model = &model,
                .element_bytes = e,
                .has_kernels = has_kernels,
                .has_gram = has_gram,
                .passes = Passes::of(e, has_kernels),
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
  const Passes& pass = s.passes;
  const double bytes_per_token = 2 * pass.norm * s.d + 2 * 3 * s.element_bytes * s.d +
                                 pass.rotary * (s.d_query + s.d_key) + pass.heads * s.d_query +
                                 pass.gate * s.f;
  return {.gemm_flops = 2 * n_tokens * s.block_linears,
          // 4 T d_query a token for scores and mixed values, half of it above the diagonal.
          .attention_flops = 2 * n_tokens * length * s.d_query,
          .traffic_bytes = n_tokens * bytes_per_token,
          .n_operations = s.has_kernels ? kForwardOperations : kAtenForwardOperations};
}

Work backward_block(const Shapes& s, double n_tokens, double length, const config::Sensitivity& sensitivity) {
  const Work forward = forward_block(s, n_tokens, length);
  const Passes& pass = s.passes;
  const double e = s.element_bytes, samples = static_cast<double>(sensitivity.samples);
  // Inputs of the linears again and the gradients behind them; three gradients are added where linears share
  // their input; the result is stacked. ATen's attention: rotation and transposition forward, and about twice
  // that backward.
  const double bytes_per_token = 2 * (pass.norm + pass.norm_backward) * s.d +
                                 (pass.gate + pass.gate_backward) * s.f + (3 * 2 + 2) * e * s.d +
                                 3 * (pass.rotary * (s.d_query + s.d_key) + pass.heads * s.d_query);
  const Work backward{.gemm_flops = forward.gemm_flops,
                      .attention_flops = (s.has_kernels ? 2.5 : 3.5) * forward.attention_flops,
                      .traffic_bytes = n_tokens * bytes_per_token,
                      .n_operations = s.has_kernels ? kBackwardOperations : kAtenBackwardOperations};
  Work recorded;
  for (int p = 0; p < model::kProjections; ++p) {
    const Linear w = linear_of(*s.model, p);
    // ChannelStatistics::observe: by the kernel one pass over x; by ATen to f32 and squared e+12, Σ 4, max 4.
    // ‖G‖² e; token_weights: G once more.
    double bytes = (s.has_kernels ? e : e + 20) * w.columns + 2 * e * w.rows;
    double flops = s.has_kernels ? 0 : 4 * w.columns;
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
  Work total = samples * (backward + recorded);
  if (sensitivity.covariance)
    for (int p = 0; p < model::kProjections; ++p)
      total += static_cast<double>(sensitivity.row_groups) *
               covariance_add(s, n_tokens, linear_of(*s.model, p).columns);
  return total;
}

Work head_loss(const Shapes& s, double n_tokens, const config::Sensitivity& sensitivity) {
  const double e = s.element_bytes, logits = n_tokens * s.vocabulary;
  const auto samples = static_cast<double>(sensitivity.samples);
  // Logits e. nll by the kernel: read twice, probabilities written; by ATen: to f32 e+4, logsumexp 24,
  // difference 8, exp 8, back 4+e. Fisher: to f32 e+4, the same in f32 40, cumulative f64 12. A sample: p − y
  // in the place of p, or as a copy in its dtype, read by the product.
  const bool draws = sensitivity.loss == "fisher";
  const double loss = draws ? e + 56 : s.has_kernels ? 3 * e : 2 * e + 48;
  const double sample = draws ? 4 + 2 * e : e;
  return {.gemm_flops = (1 + samples) * 2 * logits * s.d,
          .traffic_bytes = logits * (e + loss + samples * sample) +
                           n_tokens * s.d * (s.passes.norm + samples * s.passes.norm_backward)};
}

Work head_compare(const Shapes& s, double n_tokens) {
  const double e = s.element_bytes, logits = n_tokens * s.vocabulary;
  // Of each model logits e, and read twice by the kernel; by ATen to f32 e+4, log_softmax 12, argmax e, and
  // once exp 8, difference 12, product 12, sum 4.
  const double compare = s.has_kernels ? 2 * 2 * e : 2 * (2 * e + 16) + 36;
  return {.gemm_flops = 2 * 2 * logits * s.d,
          .traffic_bytes = logits * (2 * e + compare) + 2 * n_tokens * s.d * s.passes.norm};
}

double panel_columns() {
  return static_cast<double>(quant::kPanel);
}

double panel_entries(double d) {
  double entries = 0;
  for (double begin = 0; begin < d; begin += panel_columns()) {
    const double end = std::min(d, begin + panel_columns());
    entries += end * (end - begin);
  }
  return entries;
}

namespace {

/// quant::factorize_panel of the columns [begin, end): steps from the right, each a small Cholesky, a
/// triangular solve of what stands above, and a product for the columns to the left.
Work factorize_panel(double begin, double end) {
  Work work{.host_traffic_bytes = kFactorTraffic * end * (end - begin)};
  while (end > begin) {
    const double first = std::max(begin, end - kFactorStep), n = end - first;
    work.f64_factor_flops += n * n * n / 3 + first * n * n;
    work.f64_gemm_flops += 2 * first * n * (first - begin);
    end = first;
  }
  return work;
}

}  // namespace

Work factorize(double d) {
  return factorize_spread(d, 1);
}

Work factorize_spread(double d, double n_ranks) {
  const double width = panel_columns(), n_panels = std::ceil(d / width);
  Work work;
  for (double p = n_panels - 1; p >= 0; --p) {
    const double begin = p * width, end = std::min(d, begin + width);
    work += factorize_panel(begin, end);
    // The rank that owns the panel to the left owns the largest share of those that are left.
    for (double earlier = p - 1; earlier >= 0; earlier -= n_ranks)
      work.f64_gemm_flops += 2 * (earlier + 1) * width * width * (end - begin);
  }
  return work;
}

Work gptaq_correction(double d) {
  return {.f64_factor_flops = 2 * d * d * d, .host_traffic_bytes = kGptaqTraffic * d * d};
}

double slab_columns(double d, const config::Quantization& q) {
  const auto n_columns = static_cast<int64_t>(d);
  int64_t widest = 0;
  for (const Range& slab : quant::refinement_slabs(quant::column_panels(n_columns, quant::kPanel),
                                                   q.group == 0 ? n_columns : q.group))
    widest = std::max(widest, slab.size());
  return static_cast<double>(widest);
}

Work refine_slabs(double d, const config::Quantization& q) {
  const auto n = static_cast<double>(q.refinement.sweeps);
  // Put together and scaled, also to load: 16 bytes an entry of the triangle.
  return {.thin_flops = n * slab_columns(d, q) * d * d,
          .host_traffic_bytes = (n + 1) * 16 * panel_entries(d)};
}

double candidate_grids(int bits, bool symmetric, bool clip_search) {
  if (!clip_search) return 1;
  // quant::shrink_factors.
  const double octaves = bits == 2 ? 2.5 : bits == 3 ? 2.0 : bits == 4 ? 1.25 : 1.0;
  const double per_octave = bits > 4 ? (symmetric ? 64 : 32) : (symmetric ? 8 * bits : 16);
  // At most six rounds of refinement follow, each a least-squares pass and one candidate (asymmetric: three);
  // the search ends when a round changes nothing, and three are counted.
  constexpr double kRounds = 3, kZeros = 9;
  return symmetric ? octaves * per_octave + 2 + kRounds * 2
                   : (octaves * per_octave + 3) * kZeros + 1 + kRounds * 4;
}

Work solve_rows(double n_rows, double d, const config::Quantization& q, double height, double threads) {
  const double rows = kTileRows * whole_tiles(n_rows),
               busiest = std::min(rows, busiest_rows(n_rows, height, threads));
  return {.thin_flops = rows * d * std::max(0.0, d - kColumnBlock),
          .column_flops = busiest * d * kColumnBlock,
          .columns = d,
          .candidates = busiest * d * candidate_grids(q.bits, q.symmetric, q.clip_search),
          .host_traffic_bytes = 16 * rows * d};
}

Work refine_rows(double n_rows, double d, const config::Quantization& q, double threads) {
  const double rows = kTileRows * whole_tiles(n_rows), sweeps = static_cast<double>(q.refinement.sweeps);
  const double slab = slab_columns(d, q), group = q.group == 0 ? d : static_cast<double>(q.group);
  // Products of a group's own H: one, and two for each zero point tried. Wider than a slab it keeps its grid.
  const double own = group > slab ? 0 : q.symmetric ? 3 : 7;
  return {.thin_flops = 2 * rows * d * (d / 2 + sweeps * (d + 2 * slab + own * group)),
          .column_flops = sweeps * busiest_rows(n_rows, kTileRows, threads) * d * kColumnBlock,
          .refined_columns = sweeps * d,
          .host_traffic_bytes = (1 + sweeps) * 24 * rows * d};
}

Work correct_rows(double n_rows, double d) {
  const double rows = kTileRows * whole_tiles(n_rows);
  return {.thin_flops = 4 * rows * d * d, .host_traffic_bytes = kScoreTraffic * rows * d};
}

Work score(double n_rows, double d, const config::Quantization& q, double threads, bool corrected) {
  const double tile = static_cast<double>(quant::tile_rows(static_cast<int64_t>(n_rows)));
  const double judged = d < kSampledColumns
                            ? n_rows
                            : std::min(n_rows, tile * std::ceil(std::ceil(n_rows / tile) / kSampledTiles));
  return {.thin_flops = judged * d * (d + std::min(d, panel_columns())) + (corrected ? n_rows * d * d : 0),
          .candidates = judged * d * candidate_grids(q.bits, q.symmetric, q.clip_search) / threads,
          .host_traffic_bytes = kScoreTraffic * (judged + (corrected ? n_rows : 0)) * d + 12 * n_rows * d};
}

}  // namespace isobath::plan
