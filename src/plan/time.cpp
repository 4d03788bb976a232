#include <isobath/plan/time.hpp>

#include <isobath/quant/row_solver.hpp>

#include "network.hpp"

namespace isobath::plan {
namespace {

// Passes over a weight when its codes become values again (quant::dequantize: codes 1+4, zero 8, scale 8, to
// storage 4+2) and are copied into the whole matrix (2), checked by digest (1) and shared (2).
constexpr double kCodeTraffic = 32;

// Of the quantize pass's time, what checkpoint.every_blocks: auto spends (pipeline/checkpoint_pace.hpp).
constexpr double kCheckpointShare = 0.02;

double seconds_of(const Job& job, const Work& work) {
  return seconds(work, job.cluster, job.computes_bf16);
}

/// Forward and backward of one microbatch on one stage, without transfers.
double step_s(const Job& job, int stage, int entry_stage, int64_t first_block) {
  const Layout& layout = job.layout;
  const config::Sensitivity& sensitivity = job.config.sensitivity;
  const double n = job.mean_microbatch() * job.length();
  const Range range = layout.blocks[static_cast<size_t>(stage)];
  const auto n_blocks = static_cast<double>(range.end - std::max(range.begin, first_block));
  const double n_recomputed = std::max(0.0, n_blocks - static_cast<double>(job.kept_blocks(stage)));
  Work work = (n_blocks + n_recomputed) * forward_block(job.shapes, n, job.length()) +
              n_blocks * backward_block(job.shapes, n, job.length(), sensitivity);
  if (stage == entry_stage) work.traffic_bytes += 2 * n * job.shapes.d * job.shapes.element_bytes;
  if (stage + 1 == layout.stages) work += head_loss(job.shapes, n, sensitivity);
  return seconds_of(job, work);
}

/// What a stage sends and receives for one microbatch: the state to the next stage, `samples` gradients back.
double transfer_s(const Job& job, int stage, int entry_stage) {
  const double bytes = job.mean_microbatch() * job.length() * job.shapes.d * job.shapes.element_bytes;
  const double states = 1 + static_cast<double>(job.config.sensitivity.samples);
  double total = 0;
  if (stage > entry_stage)
    total += states * message_s(job.cluster, Buffers::device, pipeline_crosses_nodes(job, stage - 1), bytes);
  if (stage + 1 < job.layout.stages)
    total += states * message_s(job.cluster, Buffers::device, pipeline_crosses_nodes(job, stage), bytes);
  return total;
}

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
  [[nodiscard]] double time(const Work& work) const { return seconds_of(job_, work); }
  [[nodiscard]] double local_tokens() const {
    return static_cast<double>(job_.layout.sequences_per_rank) * job_.length();
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
    const Work tree_add{.host_traffic_bytes = (n_local_shards - 1) * 12 * d * d};  // on this rank
    // In panels: the upper triangle alone; the rows are read and weighted for every six of them.
    const bool is_spread = job_.is_spread(d);
    const double share = is_spread ? panel_entries(d) / (d * d) : 1;
    const double passes = is_spread ? std::ceil(d / (6 * panel_columns())) : 1;
    const Work product = covariance_add(job_.shapes, local_tokens(), d);
    covariance_ +=
        units * (time(product) + (passes - 1) / 2 * time({.traffic_bytes = product.traffic_bytes}) +
                 share * time(n_local_shards * covariance_close(d) + tree_add));
    if (shrinks()) covariance_ += time(trace_pass(job_.shapes, local_tokens(), d));
    if (job_.is_asymmetric())
      correction_ += units * time(cross_covariance_add(job_.shapes, local_tokens(), d) +
                                  n_local_shards * cross_covariance_close(d) + tree_add);
    // Roots rotate: all but one in n_ranks need the move from rank 0.
    const double matrices = job_.is_asymmetric() ? 2 : 1;
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
    factor_ += is_spread ? units * time(factorize_spread(d, static_cast<double>(job_.layout.n_ranks())))
                         : mine * time(factorize(d));
    const double n_panels = std::ceil(d / panel_columns());
    const auto all_panels_s = [&](double element) {
      return n_panels * broadcast_s(job_, Buffers::host, element * panel_entries(d) / n_panels);
    };
    factor_out_ += units * (all_panels_s(4) + (is_spread ? all_panels_s(8) : 0));
    // Small factors are everywhere; of wider ones every use sends the panels again.
    const bool is_everywhere = d <= static_cast<double>(quant::kWholeColumns);
    if (job_.is_asymmetric()) {
      const bool is_qep = asymmetric.correction == "qep";
      const double matrix_s = broadcast_s(job_, Buffers::host, 4 * d * d);
      // C; gptaq's M; panels of the ridge factor back and forth, and those of the factor for the objective.
      factor_out_ +=
          units * (matrix_s + (is_qep ? (is_everywhere ? 1 : 2) * all_panels_s(4) : matrix_s) +
                   (is_qep && is_spread ? all_panels_s(8) : 0) + (is_everywhere ? 0 : all_panels_s(4)));
      correction_ += !is_qep ? mine * time(gptaq_correction(d))
                     : is_spread
                         ? units * time(factorize_spread(d, static_cast<double>(job_.layout.n_ranks())))
                         : mine * time(factorize(d));
    }
    if (!job_.refines()) return;
    refinement_ += units * time(refine_slabs(d, job_.config.quantization));
    if (!is_everywhere)
      factor_out_ +=
          units * static_cast<double>(1 + job_.config.quantization.refinement.sweeps) * all_panels_s(4);
  }

  void rows(int set) {
    const double d = channels(set);
    const config::Quantization& q = job_.config.quantization;
    const double threads = job_.cluster.host.threads;
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
        rows_ += time(solve_rows(mine, d, q, height, threads) + Work{.host_link_bytes = element * mine * d});
        codes_ += all_reduce_s(job_, n_rows * d * (1 + (element + 1) / group_columns(d)));
        objective_ += time(score(mine, d, q, threads, job_.is_asymmetric()));
        if (job_.refines()) refinement_ += time(refine_rows(mine, d, q, threads));
        if (job_.is_asymmetric()) correction_ += time(correct_rows(mine, d));
      } else {
        // Every rank rounds all rows; H is the identity.
        rows_ +=
            time({.candidates = n_rows * d * candidate_grids(q.bits, q.symmetric, q.clip_search) / threads});
        constexpr double kDifferenceTraffic = 27 + 12 + 8 + 4;  // dequantize, difference, square, sum
        objective_ += time({.host_traffic_bytes = kDifferenceTraffic * n_rows * d});
      }
      rows_ +=
          time({.host_link_bytes = element * n_rows * d, .host_traffic_bytes = kCodeTraffic * n_rows * d});
    }
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

/// Hidden states of the quantized prefix to the stage that enters, then a pass over the blocks from there on.
StageTime reestimate_time(const Job& job, int64_t block) {
  StageTime time = measure_time(job, block);
  const double share = static_cast<double>(job.layout.sequences_per_replica) /
                       static_cast<double>(job.config.calibration.sequences);
  if (job.layout.n_ranks() > 1)
    time.communication_s += message_s(job.cluster, Buffers::host, job.nodes() > 1,
                                      share * job.hidden_bytes() / static_cast<double>(job.streams()));
  return time;
}

void add(StageTime& total, const StageTime& part, double times) {
  total.compute_s += times * part.compute_s;
  total.idle_s += times * part.idle_s;
  total.communication_s += times * part.communication_s;
  total.disk_s += times * part.disk_s;
}

double share_of(const Job& job, int64_t n_sequences) {
  return std::min(1.0,
                  static_cast<double>(n_sequences) / static_cast<double>(job.config.calibration.sequences));
}

/// Seconds to read `share` of the blocks as they stand in the checkpoint, by each of the replicas.
double stream_s(const Job& job, double n_blocks, double readers) {
  return job.is_streamed() ? read_s(job.cluster, n_blocks * job.stored_block_bytes() * readers, job.nodes())
                           : 0;
}

}  // namespace

StageTime load_time(const Job& job) {
  if (job.is_streamed()) return {.name = "load"};
  const double bytes = job.stored_block_bytes() * job.shapes.n_blocks + job.stored_end_bytes();
  StageTime time{.name = "load"};
  time.disk_s = read_s(job.cluster, bytes * job.layout.replicas, job.nodes());
  return time;
}

StageTime measure_time(const Job& job, int64_t first_block) {
  const Layout& layout = job.layout;
  const int entry_stage = layout.stage_of(first_block);
  double compute = 0, step = 0, sum = 0;
  for (int stage = entry_stage; stage < layout.stages; ++stage) {
    const double computing = step_s(job, stage, entry_stage, first_block);
    sum += computing;
    compute = std::max(compute, computing);
    step = std::max(step, computing + transfer_s(job, stage, entry_stage));
  }
  // Clusters of rows are found on a few sequences first, in a pass of their own.
  const config::Sensitivity& sensitivity = job.config.sensitivity;
  const bool is_grouping =
      first_block == 0 && sensitivity.grouping == "cluster" && sensitivity.row_groups > 1;
  const double grouped = is_grouping ? share_of(job, sensitivity.grouping_sequences) : 0;
  const double n_passes = is_grouping ? 2 : 1;
  const double n = (1 + grouped) * static_cast<double>(layout.microbatches_per_replica);
  StageTime time{.name = "measure", .compute_s = n * compute, .communication_s = n * (step - compute)};
  time.idle_s =
      (static_cast<double>(layout.segments) + n_passes - 1) * (layout.stages - entry_stage - 1) * step;
  if (job.is_streamed()) {
    // One stage works at a time. Each block is read forward and backward while the one before computes.
    time.idle_s = n * (sum - compute);
    const double reading = stream_s(
        job, n_passes * 2 * (job.shapes.n_blocks - static_cast<double>(first_block)), layout.replicas);
    time.disk_s = std::max(0.0, reading - n * sum);
  }

  // D of each block to replica 0 of its stage, block after block, and to disk; read back once to be sure.
  double most_blocks = 0;
  for (int stage = entry_stage; stage < layout.stages; ++stage) {
    const Range range = layout.blocks[static_cast<size_t>(stage)];
    most_blocks = std::max(most_blocks, static_cast<double>(range.end - std::max(range.begin, first_block)));
  }
  if (layout.replicas > 1)
    time.communication_s +=
        most_blocks * message_s(job.cluster, Buffers::host, replicas_cross_nodes(job),
                                job.token_weight_bytes() * (layout.replicas - 1) / layout.replicas);
  double block_bytes = job.token_weight_bytes();
  if (job.config.sensitivity.covariance)
    for (int p = 0; p < model::kProjections; ++p) {
      const auto d =
          static_cast<double>(model::module_shape(job.model, static_cast<model::Projection>(p)).columns);
      block_bytes += 4 * static_cast<double>(job.config.sensitivity.row_groups) * d * d;
    }
  const double bytes = block_bytes * (job.shapes.n_blocks - static_cast<double>(first_block));
  const int64_t writers =
      (layout.stages - entry_stage + job.cluster.ranks_per_node - 1) / job.cluster.ranks_per_node;
  time.disk_s += write_s(job.cluster, bytes, writers) + read_s(job.cluster, bytes, writers);
  return time;
}

StageTime quantize_time(const Job& job, const config::Reestimate& reestimate) {
  StageTime time{.name = "quantize"};
  StageTime block{.name = "block"};
  for (const auto& [step, step_time] : BlockTime(job).steps(block))
    time.parts.emplace_back(step, job.shapes.n_blocks * step_time);
  add(time, block, job.shapes.n_blocks);
  // The owner of the next block reads it meanwhile.
  if (const double waiting = job.shapes.n_blocks * (stream_s(job, 1, 1) - block.total_s()); waiting > 0) {
    time.disk_s += waiting;
    time.parts.emplace_back("wait for streamed weights", waiting);
  }

  // A thread of rank 0 copies embedding and head during the first block; the embedding goes to all ranks.
  const double copy_s = std::max(0.0, read_s(job.cluster, job.stored_end_bytes(), 1) +
                                          write_s(job.cluster, job.stored_end_bytes(), 1) - block.total_s());
  time.disk_s += copy_s;
  time.parts.emplace_back("copy of embedding and head", copy_s);
  if (job.uses_covariance())
    time.communication_s += broadcast_s(job, Buffers::device, job.shapes.end_weight_bytes());

  // A generation holds the hidden states; it is written and read back. The last one holds none.
  const double each = write_s(job.cluster, job.hidden_bytes(), job.nodes()) +
                      read_s(job.cluster, job.hidden_bytes(), job.nodes());
  const auto every = static_cast<double>(job.config.checkpoint.every_blocks);
  const double generations =
      every > 0 ? std::ceil(job.shapes.n_blocks / every) - 1
                : std::min(job.shapes.n_blocks - 1,
                           std::floor(kCheckpointShare * time.total_s() / std::max(each, 1e-9)));
  if (job.uses_covariance() && generations > 0) {
    time.disk_s += generations * each;
    time.parts.emplace_back("checkpoints", generations * each);
  }

  if (job.is_weighted() && reestimate.policy != "never") {
    StageTime all{.name = "re-estimation"};
    // Drift compares on a few sequences first; each comparison may lead to a refresh, so this is the most.
    const double compared = reestimate.policy == "drift" ? share_of(job, reestimate.probe_sequences) : 0;
    for (int64_t at = reestimate.blocks; at < job.model.n_blocks; at += reestimate.blocks)
      add(all, reestimate_time(job, at), 1 + compared);
    add(time, all, 1);
    time.parts.emplace_back("re-estimation", all.total_s());
  }
  return time;
}

StageTime evaluate_time(const Job& job) {
  const Layout& layout = job.layout;
  const auto window = static_cast<double>(job.config.evaluation.window);
  double compute = 0, step = 0;
  for (int stage = 0; stage < layout.stages; ++stage) {
    Work work = 2 * static_cast<double>(layout.blocks[static_cast<size_t>(stage)].size()) *
                forward_block(job.shapes, window, window);
    if (stage + 1 == layout.stages) work += head_compare(job.shapes, window);
    const double computing = seconds_of(job, work);
    const double bytes = 2 * window * job.shapes.d * job.shapes.element_bytes;
    double transfer = 0;
    if (stage > 0)
      transfer += message_s(job.cluster, Buffers::device, pipeline_crosses_nodes(job, stage - 1), bytes);
    if (stage + 1 < layout.stages)
      transfer += message_s(job.cluster, Buffers::device, pipeline_crosses_nodes(job, stage), bytes);
    compute = std::max(compute, computing);
    step = std::max(step, computing + transfer);
  }
  const auto n = static_cast<double>(partition(job.config.evaluation.windows, layout.replicas, 0).size());
  StageTime time{.name = "evaluate", .compute_s = n * compute};
  time.communication_s =
      n * (step - compute) +
      all_reduce_s(job, 16.0 * window * static_cast<double>(job.config.evaluation.windows));
  time.idle_s = (layout.stages - 1) * step;
  double quantized = 0, most_blocks = 0;
  for (int64_t block = 0; block < job.model.n_blocks; ++block) quantized += job.quantized_block_bytes(block);
  for (const Range& range : layout.blocks)
    most_blocks = std::max(most_blocks, static_cast<double>(range.size()));
  time.disk_s = read_s(job.cluster, (quantized + job.stored_end_bytes()) * layout.replicas, job.nodes());
  if (job.is_streamed())
    time.disk_s =
        std::max(0.0, time.disk_s + stream_s(job, job.shapes.n_blocks, layout.replicas) - n * compute);
  // Each rank unpacks and dequantizes its own blocks.
  const double codes = most_blocks * job.shapes.block_linears;
  time.compute_s += seconds_of(job, {.host_link_bytes = job.shapes.element_bytes * codes,
                                     .packed_codes = codes,
                                     .host_traffic_bytes = kCodeTraffic * codes});
  return time;
}

}  // namespace isobath::plan
