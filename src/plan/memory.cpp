#include <array>
#include <isobath/model/block.hpp>
#include <isobath/plan/memory.hpp>

namespace isobath::plan {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// LibTorch, MPI and the program itself: 0.13 GiB resident after start, and about as much again once oneDNN
// and MPI have worked (docs/performance.md). A CUDA context: assumed.
constexpr double kProcessBytes = 0.25 * kGiB, kDeviceContextBytes = 0.6 * kGiB;

// Rows of logits that exist at once (model/head.cpp, evaluate/token_metrics.cpp).
constexpr double kLossChunk = 256, kCompareChunk = 128;

// quant::factorize at its peak, f64 matrices: ordered, Cholesky factor, identity, solution, its flipped copy,
// and the f32 result. The corrections hold as much: five f64 matrices and the result.
constexpr double kFactorBytes = 5 * 8 + 4;

double weight_bytes(const Job& job, int stage) {
  const Layout& layout = job.layout;
  const int n_ends = (stage == 0 ? 1 : 0) + (stage + 1 == layout.stages ? 1 : 0);
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
  // The gate's gradient, in f32 by ATen with six temporaries; attention's gradients and the pairs of its
  // kernel, by ATen the rotated and transposed copies and the gradients of all of them.
  const double gate = (s.has_kernels ? e : e + 24) * s.f;
  const double attention = e * (s.has_kernels ? 2 * s.d_query + 4 * s.d_key : 6 * s.d_query + 8 * s.d_key);
  const double statistics = 8 * s.f + 4 * s.d;  // of one sequence: x to f32, squared; G to f32
  return n_tokens * (states + 2 * e * s.f + std::max(gate, attention)) + job.length() * statistics;
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

/// H of one input set after another. On every rank first their sums, then all matrices that solving takes; in
/// between, on the ranks that factorize, what that takes.
void add_solver(const Job& job, RankMemory& memory) {
  const bool has_devices = job.cluster.has_devices();
  const double sums = job.is_asymmetric() ? 2 : 1;  // H, C
  // H and factor, damped H, C and correction.
  const double solving = 2 + (job.refines() ? 1 : 0) + (job.is_asymmetric() ? 2 : 0);
  RankMemory::Item h{"H and factors"};
  double host = 0;
  std::array<double, model::kInputSets> factorizing{};
  for (int set = 0; set < model::kInputSets; ++set) {
    const auto shape = model::module_shape(job.model, model::input_set(set).front());
    const auto d = static_cast<double>(shape.columns);
    const double matrix = 4 * d * d;
    const auto units = static_cast<double>(job.units_of(set)),
               mine = static_cast<double>(job.units_of_root(set));
    // Covariance::value makes two triangles and their sum beside the sums; one partial sum arrives.
    const double device = (sums * units + 3) * matrix;
    const double partial = (sums * units * tree_levels(job.layout.shards_per_rank) + 1) * matrix;
    h.device_bytes = std::max(h.device_bytes, device);
    host = std::max({host, (has_devices ? 0 : device) + partial, units * solving * matrix});
    // The matrices of its own units, the last one's factor or correction as part of what making it takes.
    factorizing[static_cast<size_t>(set)] = (2 * sums * mine - 1) * matrix + kFactorBytes * d * d;
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

RankMemory measure_memory(const Job& job, int stage) {
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
  memory.items.push_back({"weights", weight_bytes(job, stage)});
  // Values on the device, with a correction the original ones too; codes of the block, and of the module in
  // work its part and f32 values, on the host.
  memory.items.push_back({"block in work", static_cast<double>(job.streams()) * s.block_weight_bytes(),
                          s.block_linears + 11 * largest_module(job)});
  if (!job.uses_covariance()) {
    // quant::objective: five f32 matrices and the identity.
    memory.items.back().host_bytes += 20 * largest_module(job) + 4 * s.f * s.f;
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
  memory.items.push_back({"weights of both models", 2 * weight_bytes(job, stage), 12 * largest_module(job)});
  // States of both models in and out, a norm in f32, and the widest step of a block.
  memory.items.push_back({"hidden states", window * (s.element_bytes * (8 * s.d + 3 * s.f) + 8 * s.d)});
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
