#include <array>
#include <isobath/model/block.hpp>
#include <isobath/plan/memory.hpp>
#include <isobath/quant/factor.hpp>

namespace isobath::plan {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// LibTorch, MPI and the program itself: 0.13 GiB resident after start, and about as much again once oneDNN
// and MPI have worked (docs/performance.md). A CUDA context: assumed.
constexpr double kProcessBytes = 0.25 * kGiB, kDeviceContextBytes = 0.6 * kGiB;

// Rows of logits that exist at once (model/head.cpp, evaluate/token_metrics.cpp).
constexpr double kLossChunk = 256, kCompareChunk = 128;

// A correction at its peak: five f64 matrices and the result.
constexpr double kCorrectionBytes = 5 * 8 + 4;

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
  const double statistics = 8 * s.f + 4 * s.d;  // of one sequence: x to f32, squared; G to f32
  return n_tokens * (states + 2 * e * s.f) + std::max(n_tokens * gate, attention) + job.length() * statistics;
}

/// Logits of one chunk of the loss, probabilities, p − y; by ATen in f32 with two temporaries, and with
/// labels drawn also f32 probabilities and their f64 sums.
double loss_bytes(const Job& job) {
  const double e = job.shapes.element_bytes;
  const bool draws = job.config.sensitivity.loss == "fisher";
  return kLossChunk * job.shapes.vocabulary *
         (draws ? 2 * e + 24 : 3 * e + (job.shapes.has_kernels ? 0 : 12));
}

double largest_module(const Job& job) {
  double largest = 0;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto shape = model::module_shape(job.model, static_cast<model::Projection>(p));
    largest = std::max(largest, static_cast<double>(shape.rows) * static_cast<double>(shape.columns));
  }
  return largest;
}

// A module's values made from its codes: in the storage dtype, and in the compute dtype when that is another.
double dequantize_bytes(const Job& job) {
  constexpr double kStorageBytes = 2;
  const double e = job.shapes.element_bytes;
  return (kStorageBytes + (e == kStorageBytes ? 0 : e)) * largest_module(job);
}

/// Partial sums of a tree over n local shards: at most one a level.
double tree_levels(int64_t n_shards) {
  return 1 + std::floor(std::log2(static_cast<double>(n_shards)));
}

RankMemory::Item process(const Job& job) {
  return {"process", job.cluster.has_devices() ? kDeviceContextBytes : 0, kProcessBytes};
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

/// What solving an input set holds on a rank, by phase; `root` beyond it on a rank that factorizes.
struct SolverMemory {
  double device_sums = 0;  ///< while H is summed
  double host_sums = 0;    ///< partial sums, and panels of H that are complete
  double factorizing = 0;
  double solving = 0;
};

/// Rows in work on one rank: errors and codes of its tiles of the modules that are solved together: all of a
/// set, or those that one factor serves which is spread.
double row_bytes(const Job& job, int set, double d) {
  double bytes = 0;
  for (const model::Projection p : model::input_set(set)) {
    const double groups = job.is_weighted() ? static_cast<double>(job.config.sensitivity.row_groups) : 1;
    const double rows = std::ceil(static_cast<double>(model::module_shape(job.model, p).rows) / groups);
    const double mine = 5 * job.largest_row_share(rows) * d;
    bytes = job.is_weighted() && job.is_spread(d) ? std::max(bytes, mine) : bytes + groups * mine;
  }
  return bytes;
}

SolverMemory whole_memory(const Job& job, int set, double d) {
  const double matrix = 4 * d * d, triangle = panel_entries(d), sums = job.is_asymmetric() ? 2 : 1;
  const auto units = static_cast<double>(job.units_of(set)),
             mine = static_cast<double>(job.units_of_root(set));
  SolverMemory memory;
  memory.device_sums = sums * units * matrix;
  // One partial sum arrives.
  memory.host_sums = (sums * units * tree_levels(job.layout.shards_per_rank) + 1) * matrix;
  // H and C of its own units, the factors of those it has done, and one in f64; or a correction in work.
  const double done = 4 * triangle + (job.is_asymmetric() ? matrix : 0);
  memory.factorizing = mine * sums * matrix + (mine - 1) * done +
                       (job.is_asymmetric() ? 4 * triangle + kCorrectionBytes * d * d : 8 * triangle);
  // Own factors, of every unit what all ranks hold, and one damped H.
  const double shared =
      units * ((job.needs_whole() ? 1 : 0) + (job.is_asymmetric() ? 2 : 0)) + (job.refines() ? 1 : 0);
  // Small factors go to all ranks at once, those of wider ones panel by panel.
  const bool at_once = d <= static_cast<double>(quant::kWholeColumns);
  memory.solving = (at_once ? units : mine) * 4 * triangle + shared * matrix +
                   (at_once ? 0 : 4 * std::min(d, panel_columns()) * d);
  return memory;
}

/// Of one unit at a time, in panels that all ranks share.
SolverMemory spread_memory(const Job& job, double d) {
  const double ranks = static_cast<double>(job.layout.n_ranks()), width = panel_columns();
  const double panel = width * d, own = panel_entries(d) / ranks;
  SolverMemory memory;
  // The first pass sums the widest panels, when none is complete; the last one when all are.
  constexpr double kPanelsPerPass = 6;  // pipeline/panel_factor.hpp
  memory.device_sums = 4 * kPanelsPerPass * panel;
  memory.host_sums = std::max(4 * (kPanelsPerPass * tree_levels(job.layout.shards_per_rank) + 1) * panel,
                              4 * own - memory.device_sums);
  // A panel on its way, its columns divided, and the result in f32.
  memory.factorizing = 8 * own + (8 + 8 + 4) * panel;
  memory.solving = 4 * own + 4 * panel;
  return memory;
}

/// H of one input set after another, and the rows of its modules.
void add_solver(const Job& job, RankMemory& memory) {
  const bool has_devices = job.cluster.has_devices();
  RankMemory::Item h{"H, factors and rows"};
  double host = dequantize_bytes(job);
  std::array<double, model::kInputSets> factorizing{};
  for (int set = 0; set < model::kInputSets; ++set) {
    const auto d = static_cast<double>(model::module_shape(job.model, model::input_set(set).front()).columns);
    const SolverMemory phases = job.is_spread(d) ? spread_memory(job, d) : whole_memory(job, set, d);
    h.device_bytes = std::max(h.device_bytes, phases.device_sums);
    host = std::max({host, (has_devices ? 0 : phases.device_sums) + phases.host_sums,
                     phases.solving + row_bytes(job, set, d)});
    if (job.is_spread(d))
      host = std::max(host, phases.factorizing);  // all ranks do
    else
      factorizing[static_cast<size_t>(set)] = phases.factorizing;
  }
  // Without devices the same memory holds all of it.
  h.host_bytes = host - (has_devices ? 0 : h.device_bytes);
  memory.items.push_back(h);
  const int64_t on_node = std::min(job.cluster.ranks_per_node, job.layout.n_ranks());
  for (int set = 0; set < model::kInputSets; ++set) {
    const double more = std::max(0.0, factorizing[static_cast<size_t>(set)] - host);
    memory.root_bytes = std::max(memory.root_bytes, more);
    memory.node_root_bytes =
        std::max(memory.node_root_bytes, static_cast<double>(std::min(on_node, job.units_of(set))) * more);
  }
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

/// Every microbatch through one block before the next (pipeline/measure_steps.hpp): whatever the stage, what
/// the one with the most blocks holds.
RankMemory streamed_measure_memory(const Job& job, int stage) {
  const Layout& layout = job.layout;
  const auto samples = static_cast<double>(job.config.sensitivity.samples);
  const double n = static_cast<double>(layout.largest_microbatch) * job.length();
  const double state_bytes = job.shapes.d * job.shapes.element_bytes;
  const double all_states = static_cast<double>(layout.sequences_per_replica) * job.length() * state_bytes;
  const auto n_blocks = static_cast<double>(layout.blocks[static_cast<size_t>(stage)].size());
  const bool is_last = stage + 1 == layout.stages;
  RankMemory memory;
  memory.items.push_back(process(job));
  memory.items.push_back({"weights", weight_bytes(job, stage)});
  double inputs = n_blocks * all_states;
  if (!job.config.scratch.directory.empty()) inputs = std::min(inputs, job.config.scratch.memory_gib * kGiB);
  memory.items.push_back({"block inputs", inputs});
  memory.items.push_back({"states", samples * all_states});
  memory.items.push_back({"backward", std::max(activation_bytes(job, n) + backward_bytes(job, n),
                                               is_last ? loss_bytes(job) : 0) +
                                          2 * samples * n * state_bytes});
  memory.items.push_back(
      {"D", 0,
       job.token_weight_bytes() * (static_cast<double>(layout.sequences_per_replica) /
                                       static_cast<double>(job.config.calibration.sequences) +
                                   8.0 / 7.0)});
  if (job.config.sensitivity.covariance) memory.items.push_back(covariance_of_measure(job, 1));
  return memory;
}

}  // namespace

RankMemory measure_memory(const Job& job, int stage) {
  if (job.is_streamed()) return streamed_measure_memory(job, stage);
  const Layout& layout = job.layout;
  const Shapes& s = job.shapes;
  const bool is_last = stage + 1 == layout.stages;
  const auto n_blocks = static_cast<double>(layout.blocks[static_cast<size_t>(stage)].size());
  const auto samples = static_cast<double>(job.config.sensitivity.samples);
  const double n = static_cast<double>(layout.largest_microbatch) * job.length();
  const double state = n * s.d * s.element_bytes;
  const auto in_flight =
      static_cast<double>(std::min<int64_t>(layout.stages - stage, layout.microbatches_per_replica));
  const double logits = is_last ? loss_bytes(job) : 0;
  const auto kept = static_cast<double>(job.kept_blocks(stage));
  const double recomputed = kept < n_blocks ? activation_bytes(job, n) : 0;
  const int n_neighbours = (stage > 0 ? 1 : 0) + (is_last ? 0 : 1);

  RankMemory memory;
  memory.items.push_back(process(job));
  memory.items.push_back({"weights", weight_bytes(job, stage)});
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
  if (!job.is_streamed() && layout.stages > 1) memory.items.push_back({"next block", s.block_weight_bytes()});
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
  const double copies = (s.has_kernels && e < 4 ? e : 8) + (job.is_asymmetric() ? 8 + 2 * e : 0);
  memory.items.push_back({"hidden states", static_cast<double>(job.streams()) * local_tokens * e *
                                                   (s.d + std::max(s.d_query, s.f)) +
                                               n * std::max(2 * e, copies) * s.f});
  if (job.is_weighted()) memory.items.push_back({"D", 0, 1.5 * job.token_weight_bytes()});
  add_solver(job, memory);
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
    const double node =
        static_cast<double>(std::min(job.cluster.ranks_per_node, job.layout.n_ranks())) * host +
        memory.node_root_bytes;
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
    if (!job.config.evaluation.tokens.empty()) consider(evaluate_memory(job, stage), "evaluate");
  }
  return need;
}

bool fits(const MemoryNeed& need, const Cluster& cluster) {
  return need.node_bytes <= kUsableShare * cluster.memory.node_gib * kGiB &&
         (!cluster.has_devices() || need.device_bytes <= kUsableShare * cluster.memory.device_gib * kGiB);
}

}  // namespace isobath::plan
