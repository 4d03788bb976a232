#include <isobath/model/block.hpp>
#include <isobath/plan/memory.hpp>

#include "solver_memory.hpp"

namespace isobath::plan {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// LibTorch, MPI and the program itself: 0.13 GiB resident after start, and about as much again once oneDNN
// and MPI have worked (docs/performance.md).
constexpr double kProcessBytes = 0.25 * kGiB;
// With CUDA: its context on the device, assumed; on the host the libraries that ATen loads, as one H100
// showed.
constexpr double kDeviceContextBytes = 0.6 * kGiB, kDeviceLibraryBytes = 1.0 * kGiB;

// Rows of logits that exist at once (model/head.cpp, evaluate/token_metrics.cpp).
constexpr double kLossChunk = 256, kCompareChunk = 128;

/// Of resident weights, or of streamed ones in a pass forward or backward: a block in work and one read
/// ahead, if the stage has another; where embedding or head are read, one block at most stands beside them.
double weight_bytes(const Job& job, int stage) {
  const Layout& layout = job.layout;
  if (job.is_streamed()) {
    const bool has_another = layout.blocks[static_cast<size_t>(stage)].size() > 1;
    return job.shapes.block_weight_bytes() +
           std::max(has_another ? job.shapes.block_weight_bytes() : 0, job.shapes.end_weight_bytes());
  }
  // A head that is tied to the embedding of the same stage is that tensor.
  const bool is_shared = job.model.tied_embeddings && layout.stages == 1;
  const int n_ends = is_shared ? 1 : (stage == 0 ? 1 : 0) + (stage + 1 == layout.stages ? 1 : 0);
  return static_cast<double>(layout.blocks[static_cast<size_t>(stage)].size()) *
             job.shapes.block_weight_bytes() +
         n_ends * job.shapes.end_weight_bytes();
}

double activation_bytes(const Job& job, double n_tokens) {
  return static_cast<double>(model::activation_bytes(job.model, static_cast<int64_t>(n_tokens),
                                                     static_cast<int64_t>(job.shapes.element_bytes)));
}

/// What model::block_backward holds beside the activations of the block: gradients of gate and up, and the
/// widest of its steps.
double backward_bytes(const Job& job, double n_tokens) {
  const Shapes& s = job.shapes;
  const double e = s.element_bytes;
  const double states = 4 * e * s.d;  // the gradient at three places, and a norm's output
  // The gate's gradient, in f32 by ATen with six temporaries; attention's gradients, the pairs of its kernel
  // and each query head's share of its keys' gradients in f32, one sequence's, by ATen the rotated and
  // transposed copies and the gradients of all of them.
  const double gate = (s.has_kernels ? e : e + 24) * s.f;
  const double attention =
      n_tokens * e * (s.has_kernels ? 2 * s.d_query + 4 * s.d_key : 6 * s.d_query + 8 * s.d_key) +
      (s.has_kernels ? job.length() * 8 * s.d_query : 0);
  const double statistics = s.has_kernels ? 0 : 8 * s.f;  // of one sequence: x to f32, squared
  return n_tokens * (states + 2 * e * s.f) + std::max(n_tokens * gate, attention) + job.length() * statistics;
}

/// Logits of one chunk of the loss and probabilities, in whose place p − y is made; by ATen in f32 with two
/// temporaries. With labels drawn also f32 probabilities and their f64 sums. kl: logits of both models, and
/// probabilities of both and their difference in f32; by ATen their comparison takes more, in f32 with
/// log-probabilities and temporaries.
double loss_bytes(const Job& job, const std::string& loss) {
  const double e = job.shapes.element_bytes;
  const bool has_kernels = job.shapes.has_kernels;
  const double each = loss == "fisher" ? 2 * e + 24
                      : loss == "kl"   ? (has_kernels ? 3 * e + 12 : 2 * e + 28)
                                       : 2 * e + (has_kernels ? 0 : 12);
  return kLossChunk * job.shapes.vocabulary * each;
}

/// A pass of measure: over all blocks, or those that are not quantized yet.
struct Pass {
  int64_t first_block = 0;
  std::string loss;

  [[nodiscard]] double n_blocks(const Job& job, int stage) const {
    const Range blocks = job.layout.blocks[static_cast<size_t>(stage)];
    return static_cast<double>(std::max<int64_t>(0, blocks.end - std::max(blocks.begin, first_block)));
  }
  [[nodiscard]] bool scores(const Job& job) const {
    return first_block == 0 && !job.config.sensitivity.gram_bits.empty();
  }
  [[nodiscard]] double n_samples(const Job& job) const {
    return loss == "fisher" ? static_cast<double>(job.config.sensitivity.samples) : 1;
  }
};

/// Hidden states of a replica's sequences at one place of the model.
double replica_states(const Job& job) {
  return static_cast<double>(job.layout.sequences_per_replica) * job.length() * job.shapes.d *
         job.shapes.element_bytes;
}

/// The original model's, which loss kl keeps from the first re-estimation to the end, and tracking of its
/// sequences.
RankMemory::Item original_outputs(const Job& job, int stage) {
  const config::Reestimate& reestimate = job.config.quantization.reestimate;
  double share = 0;
  if (job.reestimates() && reestimate.loss == "kl")
    share = 1;
  else if (job.uses_covariance() && reestimate.track)
    share = std::min(1.0, static_cast<double>(reestimate.probe_sequences) /
                              static_cast<double>(job.layout.sequences_per_replica));
  return {"outputs of the original", stage + 1 == job.layout.stages ? share * replica_states(job) : 0};
}

RankMemory::Item process(const Job& job) {
  const bool has_devices = job.cluster.has_devices();
  return {"process", has_devices ? kDeviceContextBytes : 0,
          kProcessBytes + (has_devices ? kDeviceLibraryBytes : 0)};
}

RankMemory::Item covariance_of_measure(const Job& job, double n_blocks) {
  RankMemory::Item item{"H of the original model"};
  for (int p = 0; p < model::kProjections; ++p) {
    const auto d =
        static_cast<double>(model::module_shape(job.model, static_cast<model::Projection>(p)).columns);
    const double matrices = n_blocks * static_cast<double>(job.config.sensitivity.row_groups) * 4 * d * d;
    item.device_bytes += matrices;
    item.host_bytes += matrices * tree_levels(job.layout.shards_per_replica);
  }
  return item;
}

}  // namespace

double RankMemory::device_bytes() const {
  double total = 0;
  for (const Item& item : items) total += item.device_bytes;
  return total;
}

double RankMemory::host_bytes() const {
  double total = 0;
  for (const Item& item : items) total += item.host_bytes;
  return total;
}

namespace {

BlockInputs block_inputs_of(const Job& job, int stage, const Pass& pass) {
  const config::Scratch& scratch = job.config.scratch;
  BlockInputs inputs{.memory_bytes = pass.n_blocks(job, stage) * replica_states(job)};
  if (scratch.directory.empty()) return inputs;
  // Microbatches are kept whole.
  const double state = static_cast<double>(job.layout.largest_microbatch) * job.length() * job.shapes.d *
                       job.shapes.element_bytes;
  const double kept = std::min(inputs.memory_bytes, state * std::floor(scratch.memory_gib * kGiB / state));
  inputs.disk_bytes = inputs.memory_bytes - kept;
  inputs.memory_bytes = kept;
  return inputs;
}

/// What scoring widths keeps of so many blocks, in the first pass alone: weights of the checkpoints that are
/// scored in their dtype, or grids; and a tile of rows in work.
RankMemory::Item scored_widths(const Job& job, double n_blocks) {
  const config::Sensitivity& sensitivity = job.config.sensitivity;
  const auto n_widths = static_cast<double>(sensitivity.gram_bits.size());
  const auto stored = static_cast<double>(c10::elementSize(job.model.dtype));
  // Scale in the model's dtype and zero point of a group.
  const int64_t group = job.config.quantization.group;
  const double grid_bytes = (stored + 1) / static_cast<double>(group > 0 ? group : job.model.d_model);
  const double a_weight = sensitivity.gram_checkpoints.empty() ? grid_bytes : stored;
  return {"scored widths", n_widths * n_blocks * job.shapes.block_linears * a_weight +
                               score_bytes(job.shapes, static_cast<double>(job.layout.largest_microbatch))};
}

/// Every microbatch through one block before the next (pipeline/measure_steps.hpp): whatever the stage, what
/// the one with the most blocks holds.
RankMemory streamed_pass_memory(const Job& job, int stage, const Pass& pass) {
  const Layout& layout = job.layout;
  const double samples = pass.n_samples(job);
  const double n = static_cast<double>(layout.largest_microbatch) * job.length();
  const double state_bytes = job.shapes.d * job.shapes.element_bytes;
  const bool is_last = stage + 1 == layout.stages;
  RankMemory memory;
  memory.items.push_back(process(job));
  memory.items.push_back({"weights", weight_bytes(job, stage)});
  memory.items.push_back({"block inputs", 0, block_inputs_of(job, stage, pass).memory_bytes});
  memory.items.push_back({"states", samples * replica_states(job)});
  memory.items.push_back({"backward", std::max(activation_bytes(job, n) + backward_bytes(job, n),
                                               is_last ? loss_bytes(job, pass.loss) : 0) +
                                          2 * samples * n * state_bytes});
  memory.items.push_back(
      {"D", 0,
       job.token_weight_bytes() * (static_cast<double>(layout.sequences_per_replica) /
                                       static_cast<double>(job.config.calibration.sequences) +
                                   8.0 / 7.0)});
  if (job.config.sensitivity.covariance) memory.items.push_back(covariance_of_measure(job, 1));
  if (pass.scores(job)) memory.items.push_back(scored_widths(job, 1));
  return memory;
}

RankMemory pass_memory(const Job& job, int stage, const Pass& pass) {
  if (job.is_streamed()) return streamed_pass_memory(job, stage, pass);
  const Layout& layout = job.layout;
  const Shapes& s = job.shapes;
  const bool is_last = stage + 1 == layout.stages;
  const double n_blocks = pass.n_blocks(job, stage), samples = pass.n_samples(job);
  RankMemory memory;
  memory.items.push_back(process(job));
  memory.items.push_back({"weights", weight_bytes(job, stage)});
  if (n_blocks == 0) return memory;  // behind the pass: this stage waits
  const double n = static_cast<double>(layout.largest_microbatch) * job.length();
  const double state = n * s.d * s.element_bytes;
  const auto in_flight =
      static_cast<double>(std::min<int64_t>(layout.stages - stage, layout.microbatches_per_replica));
  const double logits = is_last ? loss_bytes(job, pass.loss) : 0;
  const double kept = std::min(n_blocks, static_cast<double>(job.kept_blocks(stage)));
  const double recomputed = kept < n_blocks ? activation_bytes(job, n) : 0;
  const int n_neighbours = (stage > layout.stage_of(pass.first_block) ? 1 : 0) + (is_last ? 0 : 1);

  memory.items.push_back({"in flight", in_flight * (n_blocks + (is_last ? 1 : 0)) * state});
  memory.items.push_back({"activations kept", kept * in_flight * activation_bytes(job, n)});
  memory.items.push_back(
      {"backward", std::max(recomputed + backward_bytes(job, n), logits) + 2 * samples * state});
  // Of its own sequences for all its blocks; where a block is gathered, of all sequences for one block.
  memory.items.push_back(
      {"D", 0,
       n_blocks * job.token_weight_bytes() * static_cast<double>(layout.sequences_per_replica) /
               static_cast<double>(job.config.calibration.sequences) +
           8.0 / 7.0 * job.token_weight_bytes()});
  // One arrives and two leave in each direction at most (Link).
  memory.items.push_back({"buffers", n_neighbours * 1.5 * (1 + samples) * state});
  if (job.config.sensitivity.covariance) memory.items.push_back(covariance_of_measure(job, n_blocks));
  if (pass.scores(job)) memory.items.push_back(scored_widths(job, n_blocks));
  return memory;
}

/// Hidden states of the sequences that quantize gives this rank, of one stream.
double rank_states(const Job& job) {
  return static_cast<double>(job.layout.sequences_per_rank) * job.length() * job.shapes.d *
         job.shapes.element_bytes;
}

}  // namespace

BlockInputs block_inputs(const Job& job, int stage) {
  return job.is_streamed() && job.is_weighted() ? block_inputs_of(job, stage, {}) : BlockInputs{};
}

double scratch_bytes(const Job& job) {
  double most = 0;
  for (int stage = 0; stage < job.layout.stages; ++stage)
    most = std::max(most, block_inputs(job, stage).disk_bytes);
  return static_cast<double>(job.ranks_on_node()) * most;
}

RankMemory measure_memory(const Job& job, int stage) {
  return pass_memory(job, stage, {.loss = job.config.sensitivity.loss});
}

RankMemory reestimation_memory(const Job& job, int stage) {
  const config::Reestimate& reestimate = job.config.quantization.reestimate;
  // The first one passes through the most blocks.
  RankMemory memory =
      pass_memory(job, stage,
                  {.first_block = reestimate.blocks,
                   .loss = reestimate.loss == "same" ? job.config.sensitivity.loss : reestimate.loss});
  // A device's states are copied to the host on their way to the stage that enters.
  const bool sends = job.layout.stages > 1 && job.cluster.has_devices();
  memory.items.push_back({"hidden states of quantize", static_cast<double>(job.streams()) * rank_states(job),
                          sends ? rank_states(job) : 0});
  if (job.shares_next_block()) memory.items.push_back({"next block", job.shapes.block_weight_bytes()});
  // The original stream lets go of a block when it enters the next one.
  if (job.is_asymmetric()) memory.items.push_back({"block left", job.shapes.block_weight_bytes()});
  memory.items.push_back({"codes of the last block", 0, job.shapes.block_linears});
  memory.items.push_back(original_outputs(job, stage));
  return memory;
}

RankMemory quantize_memory(const Job& job, int stage) {
  const Layout& layout = job.layout;
  const Shapes& s = job.shapes;
  const double e = s.element_bytes;
  const double local_tokens = static_cast<double>(layout.sequences_per_rank) * job.length();
  RankMemory memory;
  memory.items.push_back(process(job));
  // Streamed: the block read ahead, and at the start, before the first block, the embedding.
  memory.items.push_back(
      {"weights", job.is_streamed()
                      ? std::max(s.block_weight_bytes(), s.end_weight_bytes() - s.block_weight_bytes())
                      : weight_bytes(job, stage)});
  // Resident weights travel to the other stages while the block before is in work.
  if (job.shares_next_block()) memory.items.push_back({"next block", s.block_weight_bytes()});
  // Values on the device, with a correction the original ones too; codes of the block on the host.
  memory.items.push_back(
      {"block in work", static_cast<double>(job.streams()) * s.block_weight_bytes(), s.block_linears});
  if (!job.uses_covariance()) {
    // The module in work: f32 weights, values and their differences.
    memory.items.back().host_bytes += dequantize_bytes(job) + 16 * largest_module(job);
    return memory;
  }
  // All states between two blocks and inside one; of the microbatch in work both inputs of the gate, or the
  // copies that the covariances make of their input.
  const double n = static_cast<double>(layout.largest_microbatch) * job.length();
  // The f32 kernel packs its input twice, for large inputs in pieces.
  const double copies = (s.has_gram && e < 4 ? e : 8) + (job.is_asymmetric() ? 8 + 2 * e : 0);
  memory.items.push_back({"hidden states", static_cast<double>(job.streams()) * local_tokens * e *
                                                   (s.d + std::max(s.d_query, s.f)) +
                                               n * std::max(2 * e, copies) * s.f});
  memory.items.push_back(original_outputs(job, stage));
  if (job.is_weighted()) memory.items.push_back({"D", 0, 1.5 * job.token_weight_bytes()});
  add_solver(job, memory);
  return memory;
}

RankMemory tune_memory(const Job& job, int stage) {
  RankMemory memory = pass_memory(job, stage, {.loss = "kl"});
  std::erase_if(memory.items, [](const RankMemory::Item& item) {
    return item.name == "D" || item.name == "scored widths" || item.name == "H of the original model";
  });
  const Range blocks = job.layout.blocks[static_cast<size_t>(stage)];
  const double weights = static_cast<double>(blocks.size()) * job.shapes.block_linears;
  double scales = 0;
  for (int64_t block = blocks.begin; block < blocks.end; ++block) scales += job.scales_of_block(block);
  // Codes; of a scale its value, where it started, its logarithm and the two means of its gradient.
  const double stored = static_cast<double>(c10::elementSize(job.model.dtype));
  memory.items.push_back({"codes and scales", weights + (stored + 1 + 16) * scales});
  // Sums of each level of the tree; ∂L/∂W of one linear.
  memory.items.push_back({"gradients", (4 * scales) * (1 + tree_levels(job.layout.shards_per_replica)) +
                                           4 * largest_module(job)});
  if (stage + 1 == job.layout.stages)
    memory.items.push_back({"outputs of the original", replica_states(job)});
  return memory;
}

RankMemory evaluate_memory(const Job& job, int stage) {
  const Shapes& s = job.shapes;
  const auto window = static_cast<double>(job.config.evaluation.window);
  const bool is_last = stage + 1 == job.layout.stages;
  RankMemory memory;
  memory.items.push_back(process(job));
  // Streamed: one model after the other, and at the end both heads.
  memory.items.push_back({"weights of both models",
                          job.is_streamed() ? std::max(weight_bytes(job, stage), 2 * s.end_weight_bytes())
                                            : 2 * weight_bytes(job, stage),
                          12 * largest_module(job)});
  // States of both models in and out, a norm in f32, and the widest step of a block; streamed, of all
  // windows.
  const double n_windows =
      job.is_streamed()
          ? static_cast<double>(partition(job.config.evaluation.windows, job.layout.replicas, 0).size())
          : 0;
  memory.items.push_back(
      {"hidden states", window * (s.element_bytes * ((8 + 2 * n_windows) * s.d + 3 * s.f) + 8 * s.d)});
  // Of both models in the compute dtype; by ATen in f32, log-probabilities, and two temporaries.
  if (is_last)
    memory.items.push_back(
        {"logits", kCompareChunk * s.vocabulary * (2 * s.element_bytes + (s.has_kernels ? 0 : 24))});
  return memory;
}

MemoryNeed memory_need(const Job& job) {
  MemoryNeed need;
  const bool has_devices = job.cluster.has_devices();
  const auto consider = [&](const RankMemory& memory, const std::string& name) {
    const double device = has_devices ? memory.device_bytes() : 0;
    const double host = memory.host_bytes() + (has_devices ? 0 : memory.device_bytes());
    const double node = static_cast<double>(job.ranks_on_node()) * host + memory.node_root_bytes;
    if (device > need.device_bytes) {
      need.device_bytes = device;
      need.device_stage = name;
    }
    if (node > need.node_bytes) {
      need.node_bytes = node;
      need.node_stage = name;
    }
  };
  for (int stage = 0; stage < job.layout.stages; ++stage) {
    if (job.is_weighted()) consider(measure_memory(job, stage), "measure");
    consider(quantize_memory(job, stage), "quantize");
    if (job.reestimates()) consider(reestimation_memory(job, stage), "re-estimation");
    if (job.tunes()) consider(tune_memory(job, stage), "tune");
    if (!job.config.evaluation.tokens.empty()) consider(evaluate_memory(job, stage), "evaluate");
  }
  return need;
}

bool fits(const MemoryNeed& need, const Cluster& cluster) {
  return need.node_bytes <= kUsableShare * cluster.memory.node_gib * kGiB &&
         (!cluster.has_devices() || need.device_bytes <= kUsableShare * cluster.memory.device_gib * kGiB);
}

}  // namespace isobath::plan
