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
// and the f32 result.
constexpr double kFactorBytes = 5 * 8 + 4;

double weight_bytes(const Job& job, int stage) {
  const Layout& layout = job.layout;
  const int n_ends = (stage == 0 ? 1 : 0) + (stage + 1 == layout.stages ? 1 : 0);
  return static_cast<double>(layout.blocks[static_cast<size_t>(stage)].size()) *
             job.shapes.block_weight_bytes() +
         n_ends * job.shapes.end_weight_bytes();
}

/// What autograd keeps of one block, and the gradients and f32 copies of its widest step.
double backward_bytes(const Job& job, double n_tokens) {
  const Shapes& s = job.shapes;
  const double e = s.element_bytes;
  const double wide = e < 4 ? 4 : 0;  // to f32 is no copy in f32
  const double norms = 2 * (wide + 2 * e) * s.d;
  const double attention = e * (3 * s.d_query + 2 * s.d_key);
  const double saved = 3 * e * s.d + norms + attention + 4 * e * s.f;
  const double gradients = 3 * e * s.f;
  const double statistics = 8 * s.f + 4 * s.d;  // of one sequence: x to f32, squared; G to f32
  return n_tokens * (saved + gradients) + job.length() * statistics;
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
  // logits, in f32, log-probabilities, (p − y) in f32.
  const double logits = is_last ? kLossChunk * s.vocabulary * (12 + s.element_bytes) : 0;
  const int n_neighbours = (stage > 0 ? 1 : 0) + (is_last ? 0 : 1);

  RankMemory memory;
  memory.items.push_back(process(job));
  memory.items.push_back({"weights", weight_bytes(job, stage)});
  memory.items.push_back({"in flight", in_flight * (n_blocks + (is_last ? 1 : 0)) * state});
  memory.items.push_back({"backward", std::max(backward_bytes(job, n), logits) + 2 * samples * state});
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
  // Values on the device; codes of the block, and of the module in work its part and f32 values, on the host.
  memory.items.push_back(
      {"block in work", s.block_weight_bytes(), s.block_linears + 11 * largest_module(job)});
  if (!job.uses_covariance()) {
    memory.items.back().host_bytes += 40 * largest_module(job);  // f64 copies of quant::objective
    return memory;
  }
  memory.items.push_back({"hidden states", local_tokens * e * (s.d + std::max(s.d_query, s.f))});
  if (job.is_weighted()) memory.items.push_back({"D", 0, 1.5 * job.token_weight_bytes()});

  // Two peaks follow one another in each input set: while H is summed, on every rank, and while it is
  // factorized, on one.
  RankMemory::Item h{"H and factors"};
  double factorizing = 0;
  for (int set = 0; set < model::kInputSets; ++set) {
    const auto shape = model::module_shape(job.model, model::input_set(set).front());
    const auto d = static_cast<double>(shape.columns);
    const double matrix = 4 * d * d;
    const auto units = static_cast<double>(job.units_of(set));
    // Covariance::value makes two triangles and their sum beside the panels; one partial sum arrives.
    h.device_bytes = std::max(h.device_bytes, (units + 3) * matrix);
    const double sums = (units * tree_levels(layout.shards_per_rank) + 1) * matrix;
    const double at_root = std::ceil(units / static_cast<double>(layout.n_ranks())) * matrix;
    h.host_bytes = std::max({h.host_bytes, sums, units * matrix + at_root});
    // The factors before it are held; its own is part of what factorization holds.
    factorizing = std::max(factorizing, (units - 1) * matrix + at_root + kFactorBytes * d * d);
    for (const model::Projection p : model::input_set(set)) {
      const double n_weights = static_cast<double>(model::module_shape(job.model, p).rows) * d;
      // The objective turns H, W and the dequantized codes to f64.
      factorizing = std::max(factorizing, units * matrix + at_root + 8 * d * d + 36 * n_weights);
    }
  }
  const double held = h.host_bytes + (job.cluster.has_devices() ? 0 : h.device_bytes);
  memory.one_rank_bytes = std::max(0.0, factorizing - held);
  memory.items.push_back(h);
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
  if (is_last) memory.items.push_back({"logits", kCompareChunk * s.vocabulary * (24 + s.element_bytes)});
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
        memory.one_rank_bytes;
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
