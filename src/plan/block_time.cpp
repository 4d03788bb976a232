#include "block_time.hpp"

#include <isobath/quant/row_solver.hpp>
#include <utility>

#include "network.hpp"
#include "solver_memory.hpp"

namespace isobath::plan {
namespace {

/// The steps of a block in the quantize pass.
class BlockTime {
 public:
  explicit BlockTime(const Job& job) : job_(job) {}

  /// Seconds of one block by step, in the order of quantize_block.
  std::vector<std::pair<std::string, double>> steps(StageTime& stage) {
    share_weights();
    for (int set = 0; set < model::kInputSets; ++set) {
      forward(set);
      if (job_.uses_covariance()) {
        accumulate(set);
        factorize_all(set);
      }
      rows(set);
    }
    write_block();
    stage.compute_s +=
        covariance_ + factor_ + rows_ + refinement_ + correction_ + objective_ + forward_ + pack_;
    stage.communication_s += weights_ + reduction_ + factor_out_ + codes_;
    stage.disk_s += disk_ + wait_;
    std::vector<std::pair<std::string, double>> parts{{"weights to all ranks", weights_},
                                                      {"forward", forward_},
                                                      {"covariance", covariance_},
                                                      {"reduction of H", reduction_},
                                                      {"factorization", factor_},
                                                      {"H and factor to all ranks", factor_out_},
                                                      {"codes of the rows", rows_},
                                                      {"codes to all ranks", codes_},
                                                      {"objective before and after", objective_},
                                                      {"packing (one rank)", pack_},
                                                      {"token weights", disk_},
                                                      {"wait for a block to be written", wait_}};
    if (job_.refines()) parts.emplace_back("refinement", refinement_);
    if (job_.is_asymmetric()) parts.emplace_back("asymmetric correction", correction_);
    return parts;
  }

 private:
  [[nodiscard]] double time(const Work& work) const {
    return seconds(work, job_.cluster, job_.computes_bf16);
  }
  [[nodiscard]] double local_tokens() const {
    return static_cast<double>(job_.layout.sequences_per_rank) * job_.length();
  }

  /// Of work where rows stand: on devices where there are some.
  [[nodiscard]] double rows_time(const Work& work) const {
    return seconds_of_rows(work, job_.cluster, job_.computes_bf16);
  }
  /// Of one factorization of an H in panels that all ranks share, which come from the host.
  [[nodiscard]] double spread_factor_time(double d) const {
    const auto n_ranks = static_cast<double>(job_.layout.n_ranks());
    return rows_time(factorize_spread(d, n_ranks) + Work{.host_link_bytes = 4 * panel_entries(d) / n_ranks});
  }

  void share_weights() {
    weights_ = broadcast_s(job_, Buffers::device, job_.shapes.block_weight_bytes());
    if (job_.is_weighted()) disk_ += read_s(job_.cluster, job_.token_weight_bytes() * nodes(), job_.nodes());
  }

  // A fourth of the norms, rotations and sums for each set; the linears and attention where they are. Where
  // the input of a set is a norm, each visit makes it again: H, the traces, and the pass itself.
  void forward(int set) {
    if (!job_.uses_covariance()) return;
    Work all = forward_block(job_.shapes, local_tokens(), job_.length());
    const double norms_again = set % 2 == 0 ? (shrinks() ? 2 : 1) : 0;
    Work work{.traffic_bytes = all.traffic_bytes / model::kInputSets +
                               norms_again * local_tokens() * job_.shapes.passes.norm * job_.shapes.d,
              .n_operations =
                  all.n_operations / model::kInputSets * static_cast<double>(job_.layout.sequences_per_rank)};
    for (const model::Projection p : model::input_set(set)) {
      const auto shape = model::module_shape(job_.model, p);
      work.gemm_flops +=
          2 * local_tokens() * static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
    }
    if (set == 0) work.attention_flops = all.attention_flops;
    // HiddenStreams::deviation: both to f32, difference, squares, once a block.
    const double compared = job_.is_asymmetric() && set == 0 ? 2 * job_.shapes.element_bytes + 44 : 0;
    forward_ += static_cast<double>(job_.streams()) * time(work) +
                time({.traffic_bytes = compared * local_tokens() * job_.shapes.d});
  }

  void accumulate(int set) {
    const double d = channels(set);
    const auto units = static_cast<double>(job_.units_of(set));
    const auto n_local_shards = static_cast<double>(job_.layout.shards_per_rank);
    const bool is_spread = job_.is_spread(d);
    const double share = is_spread ? panel_entries(d) / (d * d) : 1;
    const double passes = is_spread ? std::ceil(d / (6 * panel_columns())) : 1;
    covariance_ +=
        units * rows_time(covariance_sum(job_.shapes, local_tokens(), d, n_local_shards, is_spread));
    if (!is_spread) covariance_ += std::ceil(units / job_.layout.n_ranks()) * time(covariance_mirror(d));
    if (shrinks()) covariance_ += time(trace_pass(job_.shapes, local_tokens(), d));
    const double height = 1 + job_.residual_channels(set) / d;  // of C, in d
    const Work cross = height * cross_covariance_add(job_.shapes, local_tokens(), d);
    if (job_.is_asymmetric())
      correction_ += units * rows_time(cross + Work{.traffic_bytes = (passes - 1) * cross.traffic_bytes} +
                                       covariance_shards(d, n_local_shards));
    // Roots rotate: all but one in n_ranks need the move from rank 0.
    const double matrices = job_.is_asymmetric() ? 1 + height : 1;
    reduction_ += matrices * units * tree_sum_s(job_, share * 4 * d * d, job_.layout.n_ranks() > 1);
  }

  // Of an H that one rank holds, all roots factorize their own at once; a spread one keeps all ranks busy.
  // The panels of the factor go to all ranks, f32; those of a spread one in f64 too while it is made.
  void factorize_all(int set) {
    const double d = channels(set);
    const auto units = static_cast<double>(job_.units_of(set));
    const auto mine = static_cast<double>(job_.units_of_root(set));
    const config::Asymmetric& asymmetric = job_.config.quantization.asymmetric;
    const bool is_spread = job_.is_spread(d);
    factor_ += is_spread ? units * spread_factor_time(d)
                         : mine * time(factorize(d) + Work{.host_link_bytes = 4 * panel_entries(d)});
    const double n_panels = std::ceil(d / panel_columns());
    const auto all_panels_s = [&](double element) {
      return n_panels * broadcast_s(job_, Buffers::device, element * panel_entries(d) / n_panels);
    };
    factor_out_ += units * (all_panels_s(4) + (is_spread ? all_panels_s(8) : 0));
    // Small factors are everywhere; of wider ones every use sends the panels again.
    const bool is_everywhere = d <= static_cast<double>(quant::kWholeColumns);
    if (job_.is_asymmetric()) {
      const bool is_qep = asymmetric.correction == "qep";
      const double c_bytes = 4 * (d + job_.residual_channels(set)) * d;
      const double matrix_s = broadcast_s(job_, Buffers::device, c_bytes);
      // C; gptaq's M; panels of the ridge factor back and forth, and those of the factor for the objective.
      factor_out_ +=
          units * (matrix_s + (is_qep ? (is_everywhere ? 1 : 2) * all_panels_s(4) : matrix_s) +
                   (is_qep && is_spread ? all_panels_s(8) : 0) + (is_everywhere ? 0 : all_panels_s(4)));
      // C comes from the host of whoever has it.
      const double owners = is_spread ? static_cast<double>(job_.layout.n_ranks()) : 1;
      correction_ += units * time({.host_link_bytes = c_bytes / owners});
      correction_ += !is_qep     ? mine * time(gptaq_correction(d))
                     : is_spread ? units * spread_factor_time(d)
                                 : mine * time(factorize(d));
    }
    if (!job_.refines()) return;
    const auto passes = static_cast<double>(1 + job_.config.quantization.refinement.sweeps);
    refinement_ += units * rows_time(refine_slabs(d, job_.config.quantization));
    if (!is_everywhere) factor_out_ += units * passes * all_panels_s(4);
  }

  void rows(int set) {
    const double d = channels(set);
    const config::Quantization& q = job_.config.quantization;
    // A device takes all rows at once.
    const double threads = job_.cluster.has_devices() ? 1 : job_.cluster.host.threads;
    const double groups = job_.is_weighted() ? static_cast<double>(job_.config.sensitivity.row_groups) : 1;
    for (const model::Projection p : model::input_set(set)) {
      const auto shape = model::module_shape(job_.model, p);
      const auto n_rows = static_cast<double>(shape.rows);
      // Each row group's tiles are shared by all ranks.
      const double group_rows = std::ceil(n_rows / groups);
      const double mine = groups * job_.largest_row_share(group_rows);
      const auto height = static_cast<double>(quant::tile_rows(static_cast<int64_t>(group_rows)));
      const double element = job_.shapes.element_bytes;
      if (job_.uses_covariance()) {
        rows_ +=
            rows_time(solve_rows(mine, d, q, height, threads) + Work{.host_link_bytes = element * mine * d});
        codes_ += all_reduce_s(job_, n_rows * d * (1 + (element + 1) / group_columns(d)));
        objective(score(mine, d, q, job_.cluster.host.threads, job_.is_asymmetric()));
        if (job_.refines()) refinement_ += rows_time(refine_rows(mine, d, q, threads));
        if (job_.is_asymmetric()) correction_ += rows_time(correct_rows(mine, d));
      } else {
        // Every rank rounds all rows; H is the identity.
        rows_ += time({.candidates = n_rows * d * candidate_grids(q.bits, q.symmetric, q.clip_search) /
                                     job_.cluster.host.threads});
        constexpr double kDifferenceTraffic = 27 + 12 + 8 + 4;  // dequantize, difference, square, sum
        objective_ += time({.host_traffic_bytes = kDifferenceTraffic * n_rows * d});
      }
      rows_ +=
          time({.host_link_bytes = element * n_rows * d, .host_traffic_bytes = kCodeTraffic * n_rows * d});
    }
  }

  // Rows are rounded on the host; what that costs is judged where panels of the factor come to.
  void objective(Work work) {
    objective_ += rows_time({.thin_flops = std::exchange(work.thin_flops, 0)}) + time(work);
  }

  // A thread of one rank packs, writes, and reads back for the digest of its record, while the next block is
  // in work; CPU ranks, whose cores are all busy, lose what packing takes.
  void write_block() {
    const double bytes = job_.quantized_block_bytes(0);
    wait_ = write_s(job_.cluster, bytes, 1) + read_s(job_.cluster, bytes, 1);
    const double packing = time({.packed_codes = job_.shapes.block_linears});
    (job_.cluster.has_devices() ? wait_ : pack_) += packing;
    const double hidden = covariance_ + factor_ + rows_ + refinement_ + correction_ + objective_ + forward_ +
                          weights_ + reduction_ + factor_out_ + codes_;
    wait_ = std::max(0.0, wait_ - hidden);
  }

  [[nodiscard]] double channels(int set) const {
    return static_cast<double>(module_columns(model::input_set(set).front()));
  }
  [[nodiscard]] int64_t module_columns(model::Projection p) const {
    return model::module_shape(job_.model, p).columns;
  }
  [[nodiscard]] double group_columns(double d) const {
    return job_.config.quantization.group == 0 ? d : static_cast<double>(job_.config.quantization.group);
  }
  [[nodiscard]] bool shrinks() const {
    return job_.uses_covariance() && job_.config.sensitivity.shrinkage != 0;
  }
  [[nodiscard]] double nodes() const { return static_cast<double>(job_.nodes()); }

  const Job& job_;
  double weights_ = 0, forward_ = 0, covariance_ = 0, reduction_ = 0, factor_ = 0, factor_out_ = 0, rows_ = 0,
         refinement_ = 0, correction_ = 0, codes_ = 0, objective_ = 0, pack_ = 0, disk_ = 0, wait_ = 0;
};

}  // namespace

std::vector<std::pair<std::string, double>> block_steps(const Job& job, StageTime& stage) {
  return BlockTime(job).steps(stage);
}

}  // namespace isobath::plan
