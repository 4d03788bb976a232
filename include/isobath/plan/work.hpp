#pragma once
#include <isobath/config/run_config.hpp>
#include <isobath/model/model_config.hpp>
#include <isobath/plan/cluster.hpp>

namespace isobath::plan {

/// What a rank has to do, sorted by what limits its speed. Counts of shapes; no time in them.
struct Work {
  // On the compute device.
  double gemm_flops = 0;        ///< matrix products in the compute dtype, 2 a multiply-add
  double f32_flops = 0;         ///< matrix products in f32
  double covariance_flops = 0;  ///< executed by the tiles of kernels/gram.cpp
  double attention_flops = 0;   ///< over causal pairs only
  double traffic_bytes = 0;     ///< read + written by elementwise operations
  double n_operations = 0;      ///< operations started
  double host_link_bytes = 0;   ///< device to host or back; free without devices
  // On the host.
  double f64_factor_flops = 0;
  double f64_gemm_flops = 0;
  double thin_flops = 0;    ///< f32 products with 64 columns or rows
  double column_flops = 0;  ///< of the column loop, on one thread
  double columns = 0,
         refined_columns = 0;  ///< steps of that loop and of sweeps; a device takes time for each
  double candidates = 0;       ///< (weight, candidate grid) pairs of one thread
  double packed_codes = 0;     ///< on one thread
  double host_traffic_bytes = 0;

  Work& operator+=(const Work& other);
  friend Work operator+(Work a, const Work& b) { return a += b; }
  friend Work operator*(double factor, const Work& work);
};

/// Seconds for `work` on one rank of `cluster`: the sum over its parts, since the code does them one after
/// the other.
[[nodiscard]] double seconds(const Work& work, const Cluster& cluster, bool computes_bf16);

/// The same of work on rows and on an H in panels, counted as for one thread: on the rank's device, where the
/// cluster has some, what `Work` calls the host's.
[[nodiscard]] double seconds_of_rows(const Work& work, const Cluster& cluster, bool computes_bf16);

/// Bytes read + written a channel by the operations between products, each pass over a tensor counted.
struct Passes {
  double norm, norm_backward, gate, gate_backward;
  double rotary;  ///< of queries and keys; part of attention where kernels::attention does it
  double heads;   ///< attention's output to [b, T, d_query]

  /// One pass of src/kernels, or ATen's operations one by one.
  static Passes of(double element_bytes, bool has_kernels);
};

/// Sizes that all counts start from.
struct Shapes {
  const model::ModelConfig* model;
  double element_bytes;  ///< of the compute dtype: 2 (bf16) or 4 (f32)
  bool has_kernels;      ///< src/kernels runs: a CPU that has them for the dtype
  bool has_gram;         ///< sums of H run there, on devices too
  Passes passes;
  double d, f, d_query, d_key, vocabulary, n_blocks;
  double block_linears;  ///< weights of the seven linears of a block

  static Shapes of(const model::ModelConfig& model, bool computes_bf16, bool has_kernels, bool has_gram);
  static Shapes of(const model::ModelConfig& model, bool computes_bf16, bool has_kernels) {
    return of(model, computes_bf16, has_kernels, has_kernels);
  }
  [[nodiscard]] double block_weight_bytes() const;  ///< in the compute dtype, norms included
  [[nodiscard]] double end_weight_bytes() const;    ///< embedding, or lm_head and the final norm
};

/// y = block(x): 2 n P for the linears, 2 n T d_query for attention over causal pairs.
[[nodiscard]] Work forward_block(const Shapes& shapes, double n_tokens, double length);

/// model::block_backward for `samples` gradients, without recomputing what it needs of the forward: 2 n P
/// (∂L/∂x only: weights are frozen), the norms' and the gate's outputs again, 2.5 times the attention (five
/// products where the forward has two; ATen's attention runs forward once more), and what
/// StatisticsObserver records at each linear.
[[nodiscard]] Work backward_block(const Shapes& shapes, double n_tokens, double length,
                                  const config::Sensitivity& sensitivity);

/// sensitivity::perturbation_scores of a block's linears, for `samples` gradients and every width of
/// sensitivity.gram.bits: 2 n P for GᵀX, and passes over ΔW for each width and sequence.
[[nodiscard]] Work score_widths(const Shapes& shapes, double n_tokens, double length,
                                const config::Sensitivity& sensitivity);
/// Grids of a block's linears that the widths are rounded on, fitted once a pass.
[[nodiscard]] Work score_grids(const Shapes& shapes, const config::RunConfig& config, double threads);
/// What lives while a tile of rows is scored.
[[nodiscard]] double score_bytes(const Shapes& shapes, double n_sequences);

/// model::loss_and_gradient of `n_tokens`: logits once, (p − y) W once a sample, and the passes over [n,
/// vocab].
[[nodiscard]] Work head_loss(const Shapes& shapes, double n_tokens, const config::Sensitivity& sensitivity);

/// evaluate::compare of `n_tokens` for two models.
[[nodiscard]] Work head_compare(const Shapes& shapes, double n_tokens);

/// sensitivity::Covariance::add of n rows with d channels: the upper triangle in tiles, n d (d + 48) flops of
/// the kernel and its packing, or in panels, n d (d + panel) f32 flops.
[[nodiscard]] Work covariance_add(const Shapes& shapes, double n_rows, double d);
/// Zeros for the sum of each logical shard of a rank, what adds these up, and the way to the host; the whole
/// matrix from its upper triangle.
[[nodiscard]] Work covariance_shards(double d, double n_shards);
[[nodiscard]] Work covariance_mirror(double d);
/// A rank's part of one H: its rows in n_shards logical shards, and the sum over these; whole, or in panels.
[[nodiscard]] Work covariance_sum(const Shapes& shapes, double n_rows, double d, double n_shards,
                                  bool in_panels);

/// sensitivity::CrossCovariance::add: 2 n d² flops, in the covariance's dtype.
[[nodiscard]] Work cross_covariance_add(const Shapes& shapes, double n_rows, double d);
/// The inputs' norms that sensitivity.shrinkage needs, for n rows with d channels.
[[nodiscard]] Work trace_pass(const Shapes& shapes, double n_rows, double d);

/// Columns of a panel of the factor (quant::kPanel), and entries of all panels of d columns.
[[nodiscard]] double panel_columns();
[[nodiscard]] double panel_entries(double d);

/// quant::factorize on one rank: d³/3 flops, nearly all in f64 products; squares on the diagonal are counted
/// whole, as they are multiplied.
[[nodiscard]] Work factorize(double d);

/// pipeline::factorize_panels on the rank that is last: each panel is factorized by its owner while the
/// others wait, and subtracted from the most panels that one rank owns.
[[nodiscard]] Work factorize_spread(double d, double n_ranks);

/// The correction matrix of one H: 2 d³ of triangular solves.
[[nodiscard]] Work gptaq_correction(double d);

/// quant::gptq of `n_rows` rows (whole tiles of 64): n d² thin; 128 n d in the column loop and the clip
/// search as the busiest of `threads` threads has them, which share tiles of `height` rows.
[[nodiscard]] Work solve_rows(double n_rows, double d, const config::Quantization& quantization,
                              double height, double threads);

/// Columns of the widest of quant::refinement_slabs.
[[nodiscard]] double slab_columns(double d, const config::Quantization& quantization);

/// quant::Slab of all slabs of one factor, in every sweep: each rank makes them, w d² flops.
[[nodiscard]] Work refine_slabs(double d, const config::Quantization& quantization);

/// quant::Refiner of `n_rows` rows (whole tiles): n d² thin flops to load; a sweep 2 n d², and within a slab
/// of w columns 2 n d w after codes and after grids, 128 n d in the column loop, and the products with each
/// group's own H. All sweeps are counted: they end earlier when nothing moves. The column loop is that of
/// the busiest of `threads` threads, which share tiles of 64.
[[nodiscard]] Work refine_rows(double n_rows, double d, const config::Quantization& quantization,
                               double threads);

/// W C of `n_rows` rows (whole tiles), and QEP's two substitutions or GPTAQ's product: 2 n d² thin flops
/// each.
[[nodiscard]] Work correct_rows(double n_rows, double d);

/// The objective of round-to-nearest: of every row, or of every sixteenth tile from
/// pipeline::kSampledColumns channels on; rounding on all threads, then quant::FactoredObjective (n d² thin).
/// That of the codes comes with the column loop or the refinement, unless they are `corrected`: n d² thin.
[[nodiscard]] Work score(double n_rows, double d, const config::Quantization& quantization, double threads,
                         bool corrected);

/// Candidate grids that the clip search tries for one group (quant/candidates.hpp), refinements included.
[[nodiscard]] double candidate_grids(int bits, bool symmetric, bool clip_search);

/// Columns of Covariance's panels for d channels.
[[nodiscard]] double panel_width(double d);

}  // namespace isobath::plan
