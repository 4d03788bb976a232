#include <isobath/plan/time.hpp>

#include <isobath/quant/row_solver.hpp>

#include "block_time.hpp"
#include "network.hpp"

namespace isobath::plan {
namespace {

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
  // D measured again is all that is asked for then.
  if (first_block == 0 && !sensitivity.gram_bits.empty())
    work += n_blocks * score_widths(job.shapes, n, job.length(), sensitivity);
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

/// Forward alone through the blocks from `first_block` on, of a share of the sequences; with_loss: also KL.
StageTime forward_time(const Job& job, int64_t first_block, double share, bool with_loss) {
  // Logits of both models and the gradient's product, where a pass of its own loss has two of the three.
  constexpr double kDivergence = 1.5;
  const double n = job.mean_microbatch() * job.length();
  double most = 0, sum = 0;
  for (const Range& range : job.layout.blocks) {
    const auto n_blocks =
        static_cast<double>(std::max<int64_t>(0, range.end - std::max(range.begin, first_block)));
    Work work = n_blocks * forward_block(job.shapes, n, job.length());
    if (with_loss && range.end == job.model.n_blocks) work += kDivergence * head_loss(job.shapes, n, {});
    const double computing = seconds_of(job, work);
    most = std::max(most, computing);
    sum += computing;
  }
  const double n_microbatches =
      std::max(1.0, std::ceil(share * static_cast<double>(job.layout.microbatches_per_replica)));
  StageTime time{.name = "forward", .compute_s = n_microbatches * most, .idle_s = sum - most};
  if (job.is_streamed())
    time.disk_s = std::max(
        0.0, stream_s(job, job.shapes.n_blocks - static_cast<double>(first_block), job.layout.replicas) -
                 time.total_s());
  return time;
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
  // Grids of the widths that are scored, of all blocks of a stage before the first microbatch.
  double most_graded = 0;
  if (first_block == 0)
    for (const Range& blocks : layout.blocks)
      most_graded = std::max(
          most_graded, seconds_of(job, static_cast<double>(blocks.size()) *
                                           score_grids(job.shapes, job.config, job.cluster.host.threads)));
  time.compute_s += most_graded;
  // Checkpoints whose widths are scored are read once, in no other work's shadow.
  double scored = 0;
  if (first_block == 0 && !sensitivity.gram_checkpoints.empty())
    for (const int bits : sensitivity.gram_bits)
      for (int64_t block = 0; block < job.model.n_blocks; ++block)
        scored += job.quantized_block_bytes(block, bits);
  if (job.is_streamed()) {
    // One stage works at a time. Each block is read forward and backward while the one before computes.
    time.idle_s = n * (sum - compute);
    const double reading = stream_s(
        job, n_passes * 2 * (job.shapes.n_blocks - static_cast<double>(first_block)), layout.replicas);
    time.disk_s = std::max(0.0, reading - n * sum);
  }
  time.disk_s += read_s(job.cluster, scored * layout.replicas, job.nodes());

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
  for (const auto& [step, step_time] : block_steps(job, block))
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
    if (reestimate.loss == "kl") add(all, forward_time(job, 0, 1, /*with_loss=*/false), 1);
    add(time, all, 1);
    time.parts.emplace_back("re-estimation", all.total_s());
  }
  if (job.uses_covariance() && reestimate.track) {
    StageTime all{.name = "divergence behind each block"};
    const double share = share_of(job, reestimate.probe_sequences);
    for (int64_t behind = 1; behind <= job.model.n_blocks; ++behind)
      add(all, forward_time(job, behind, share, /*with_loss=*/true), 1);
    const bool keeps_all = job.is_weighted() && reestimate.policy != "never" && reestimate.loss == "kl";
    if (!keeps_all) add(all, forward_time(job, 0, share, /*with_loss=*/false), 1);
    add(time, all, 1);
    time.parts.emplace_back(all.name, all.total_s());
  }
  return time;
}

StageTime tune_time(const Job& job) {
  StageTime time{.name = "tune"};
  if (!job.tunes()) return time;
  const config::Tuning& tuning = job.config.quantization.tuning;
  const Layout& layout = job.layout;
  // Of a measure pass, forward and backward; the loss reads the logits of both models.
  config::RunConfig config = job.config;
  config.sensitivity = {};
  config.sensitivity.per_sequence = "off";
  const Job plain(config, job.model, job.cluster, layout.stages, layout.replicas);
  const StageTime pass = measure_time(plain);
  const double n = static_cast<double>(layout.microbatches_per_replica),
               n_tokens = job.mean_microbatch() * job.length() * n;
  double most_blocks = 0;
  for (const Range& blocks : layout.blocks)
    most_blocks = std::max(most_blocks, static_cast<double>(blocks.size()));
  const double weights = most_blocks * job.shapes.block_linears;
  constexpr double kLevelTraffic = 24;  // of a weight's gradient: codes to f32, times levels, summed
  const Work gradients{.gemm_flops = 2 * n_tokens * weights, .traffic_bytes = kLevelTraffic * n * weights};
  const double epoch_compute_s = pass.compute_s + seconds_of(job, gradients) +
                                 seconds_of(job, head_loss(job.shapes, n_tokens, config.sensitivity));
  const auto epochs = static_cast<double>(tuning.epochs);
  const double steps = static_cast<double>(std::min(tuning.steps, job.config.calibration.logical_shards));
  constexpr double kDequantizeTraffic = 27;
  const double changed_s = seconds_of(job, {.traffic_bytes = kDequantizeTraffic * weights});
  const double forward_s = seconds_of(job, most_blocks * forward_block(job.shapes, n_tokens, job.length()));
  time.compute_s = epochs * (epoch_compute_s + steps * changed_s) + forward_s;
  time.communication_s = epochs * pass.communication_s;
  time.idle_s = epochs * steps * pass.idle_s / static_cast<double>(layout.segments);
  const double scale_bytes =
      4 * weights / std::max<double>(1, static_cast<double>(job.config.quantization.group));
  if (layout.replicas > 1)
    time.communication_s +=
        2 * epochs * steps * message_s(job.cluster, Buffers::host, replicas_cross_nodes(job), scale_bytes);
  double quantized = job.stored_end_bytes();
  for (int64_t block = 0; block < job.model.n_blocks; ++block) quantized += job.quantized_block_bytes(block);
  // The quantized model, and the original again.
  const double original = job.stored_block_bytes() * job.shapes.n_blocks + job.stored_end_bytes();
  time.disk_s = read_s(job.cluster, (2 * quantized + original) * layout.replicas, job.nodes()) +
                write_s(job.cluster, quantized, job.nodes());
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
