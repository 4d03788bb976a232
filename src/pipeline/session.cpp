#include <isobath/pipeline/session.hpp>

#include <ATen/Parallel.h>
#include <isobath/comm/cores.hpp>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/core/digest.hpp>
#include <isobath/core/host_memory.hpp>
#include <isobath/core/log.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/pipeline/schedule.hpp>
#include <isobath/pipeline/validate.hpp>
#include <isobath/sensitivity/token_weights.hpp>
#include <set>

namespace isobath::pipeline {
namespace {

// Share of a host's memory that resident weights may take; the rest is for block inputs, covariances and page
// cache.
constexpr double kWeightShareOfMemory = 0.5;

// Every x86 CPU with AMX has AVX-512 bf16 too.
bool has_bfloat16_instructions() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

/// Threads of every rank: as many as the rank with the fewest cores has cores. Warns where mpirun binds ranks
/// to fewer than they could have. Collective over the world.
int choose_threads(const config::RunConfig& config, const comm::Communicator& world,
                   const comm::Communicator& node) {
  const comm::NodeCores cores = comm::cores_of(node);
  const int own = std::max(1, world.all_reduce(cores.per_rank, comm::Reduce::min));
  const int threads = config.ranks.threads > 0 ? config.ranks.threads : own;
  const int could_have = cores.available / node.size();
  const int wanted = config.ranks.threads > 0 ? std::min(threads, could_have) : could_have;
  if (node.rank() == 0 && cores.per_rank < wanted)
    log::warning(
        "{}: mpirun binds each rank to {} of {} cores, where it could have {}; start it with --bind-to none, "
        "or give each rank its cores: --map-by slot:PE={}",
        world.host(), cores.per_rank, cores.available, could_have, could_have);
  return threads;
}

/// Ranks that compute in another dtype or with other kernels than rank 0 would not notice, but their share of
/// a sum has other bits. Collective over the world.
void require_alike(const Session& session, const comm::Communicator& world) {
  const std::string kind = fmt::format(
      "{} on {} with {} kernels", c10::toString(session.dtype), session.device.is_cuda() ? "cuda" : "cpu",
      session.device.is_cpu() ? kernels::implementation_of(session.dtype) : "cuda");
  const std::vector<std::string> kinds = world.all_gather(kind), hosts = world.all_gather(world.host());
  for (size_t rank = 1; rank < kinds.size(); ++rank)
    if (kinds[rank] != kinds[0])
      world.agree(
          fmt::format("ranks would compute in different ways: rank 0 on {} in {}, rank {} on {} in {}; use "
                      "nodes of one kind, or set compute_dtype, ranks.device, or ISOBATH_KERNELS "
                      "(amx, avx512, avx2, aten) to what all of them have",
                      hosts[0], kinds[0], rank, hosts[rank], kinds[rank]),
          ExitCode::config);
}

/// The share of memory that this rank's resident weights may take: of its device's, or of the host's.
/// Collective over the node.
int64_t bytes_for_weights(c10::Device device, const comm::Communicator& node) {
  const std::vector<std::string> devices =
      node.all_gather(comm::device_identity(device));  // one "" for all CPUs
  const auto sharing = std::count(devices.begin(), devices.end(), devices[static_cast<size_t>(node.rank())]);
  const int64_t bytes =
      (device.is_cuda() ? comm::device_memory_bytes(device) : host_memory_bytes()) / sharing;
  return static_cast<int64_t>(kWeightShareOfMemory * static_cast<double>(bytes));
}

/// D must have the same bits whenever it is measured. Attention's backward pass by ATen adds in any order
/// unless told otherwise, and cuBLAS wants a workspace of its own.
void require_determinism() {
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);  // a pass over every new tensor
  at::globalContext().setAllowBF16ReductionCuBLAS(false);              // partial sums stay f32
  at::globalContext().setSDPUseMemEfficient(false);
  at::globalContext().setSDPUseCuDNN(false);
}

}  // namespace

std::vector<StageCost> stage_costs(const model::ModelConfig& model, int64_t length,
                                   const model::Activations& activations, int n_ranks) {
  int64_t block_parameters = 2 * model.d_model;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto shape = model::module_shape(model, static_cast<model::Projection>(p));
    block_parameters += shape.rows * shape.columns;
  }
  const model::CostModel cost = model::cost_of(model, length);
  std::vector<StageCost> costs;
  for (int stages = 1; stages <= std::min<int64_t>(n_ranks, model.n_blocks); ++stages) {
    StageCost worst{0, 0};
    const std::vector<Range> ranges = model::balance_stages(model, length, stages, activations);
    for (int s = 0; s < stages; ++s) {
      const int64_t n = ranges[static_cast<size_t>(s)].size();
      const int n_ends = stages == 1 && model.tied_embeddings ? 1 : (s == 0) + (s + 1 == stages);
      const double time = model::stage_cost(model, cost, activations, s, stages, n);
      // Weights are held in the dtype of the activations.
      const int64_t bytes =
          activations.element_size * (n * block_parameters + n_ends * model.vocab_size * model.d_model);
      worst = {std::max(worst.time, time), std::max(worst.weight_bytes, bytes)};
    }
    costs.push_back(worst);
  }
  return costs;
}

at::ScalarType choose_dtype(const config::RunConfig& config, const model::ModelConfig& model,
                            c10::Device device) {
  if (config.compute_dtype == "bfloat16") return at::ScalarType::BFloat16;
  if (config.compute_dtype == "float32") return at::ScalarType::Float;
  // bf16 without hardware support is several times slower than f32 on a CPU.
  const bool is_fast = device.is_cuda() || has_bfloat16_instructions();
  return model.dtype == at::ScalarType::BFloat16 && is_fast ? at::ScalarType::BFloat16
                                                            : at::ScalarType::Float;
}

model::Activations kept_activations(const config::RunConfig& config, at::ScalarType dtype) {
  return {.n_tokens = config.calibration.microbatch * config.calibration.length,
          .element_size = static_cast<int64_t>(c10::elementSize(dtype)),
          .limit_gib = config.residency == "streamed" ? 0 : config.ranks.activation_gib};
}

int Session::stage_of(int64_t block) const {
  if (block == model().n_blocks) return grid->shape().stages - 1;
  for (size_t stage = 0; stage < stage_blocks.size(); ++stage)
    if (stage_blocks[stage].contains(block)) return static_cast<int>(stage);
  fail<InternalError>("block {} belongs to no stage", block);
}

Session open_session(const config::RunConfig& config, int64_t n_microbatches,
                     const comm::Communicator& world) {
  Session session;
  session.config = config;
  const comm::Communicator node = world.node();
  world.agree_on([&] {
    session.source = std::make_shared<const model::CheckpointReader>(config.model);
    require_attended(config, session.model());
    session.device = comm::select_device(config.ranks.device, node);
    session.dtype = choose_dtype(config, session.source->config(), session.device);
  });
  require_alike(session, world);
  if (session.device.is_cuda()) require_determinism();
  // Every rank chooses the same.
  const int64_t bytes_per_rank = world.all_reduce(bytes_for_weights(session.device, node), comm::Reduce::min);
  comm::GridShape shape;
  world.agree_on([&] {
    const model::ModelConfig& model = session.model();
    shape = choose_shape(
        session.config,
        stage_costs(model, config.calibration.length, kept_activations(config, session.dtype), world.size()),
        n_microbatches, world.size(), bytes_per_rank);
    session.stage_blocks = model::balance_stages(model, config.calibration.length, shape.stages,
                                                 kept_activations(session.config, session.dtype));
  });
  session.grid = std::make_unique<comm::Grid>(world, shape);
  session.devices = std::make_unique<comm::DeviceCommunicator>(session.world(), session.device);
  session.threads = choose_threads(config, world, node);
  at::set_num_threads(session.threads);
  log::info("ranks {} = stages {} x replicas {}, threads per rank {}, {} on {}{}", world.size(), shape.stages,
            shape.replicas, session.threads, c10::toString(session.dtype), session.device.str(),
            session.is_streamed() ? ", weights streamed" : "");
  return session;
}

at::Tensor CalibrationSet::mask_of(Range sequences) const {
  const at::Tensor lengths = lengths_of(sequences);
  if ((lengths == tokens.length()).all().item<bool>()) return {};
  return at::arange(tokens.length(), lengths.options()).unsqueeze(0) < lengths.unsqueeze(1);
}

std::string tokenizer_digest(const std::filesystem::path& model_directory) {
  const auto path = model_directory / "tokenizer.json";
  return std::filesystem::exists(path) ? file_sha256(path) : std::string();
}

data::TokenRequirements requirements_of(const config::RunConfig& config, const model::ModelConfig& model) {
  return {.vocab_size = model.vocab_size,
          .tokenizer_sha256 = tokenizer_digest(config.model),
          .n_sequences = config.calibration.sequences,
          .length = config.calibration.length};
}

data::TokenRequirements evaluation_requirements_of(const config::RunConfig& config,
                                                   const model::ModelConfig& model) {
  return {.vocab_size = model.vocab_size,
          .tokenizer_sha256 = tokenizer_digest(config.model),
          .n_sequences = config.evaluation.windows,
          .length = config.evaluation.window};
}

CalibrationSet open_calibration(const Session& session) {
  const config::Calibration& calibration = session.config.calibration;
  data::TokenSet tokens = data::open_tokens(
      calibration.tokens, requirements_of(session.config, session.model()), session.world());
  data::ShardPlan shards(tokens.n_sequences(), calibration.logical_shards, calibration.microbatch);
  return {std::move(tokens), std::move(shards)};
}

model::WeightStore open_weights(const Session& session,
                                std::shared_ptr<const model::CheckpointReader> checkpoint) {
  model::WeightStore weights = model::WeightStore::streamed(checkpoint, session.dtype, session.device);
  if (session.is_streamed()) return weights;
  session.world().agree_on([&] {
    weights = model::WeightStore::resident(
        checkpoint, session.dtype, session.device,
        {session.my_blocks(), session.grid->stage() == 0, session.is_last_stage()});
  });
  return weights;
}

BlockRowGroups row_groups_of(const Session& session) {
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  ISOBATH_CHECK(!clusters_rows(sensitivity), "the rows of clusters are not known from the configuration");
  BlockRowGroups groups;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    groups[static_cast<size_t>(p)] = sensitivity::row_ranges(
        model::module_shape(session.model(), projection).rows, sensitivity.row_groups,
        sensitivity.grouping == "head" ? model::rows_of_head(session.model(), projection) : 1);
  }
  return groups;
}

bool clusters_rows(const config::Sensitivity& sensitivity) {
  return sensitivity.row_groups > 1 && sensitivity.grouping == "cluster";
}

model::BlockWeights take_block(const Session& session, const model::WeightStore& weights, int64_t block,
                               bool mine, int64_t next) {
  model::BlockWeights taken;
  session.world().agree_on([&] {
    if (!mine) return;
    taken = weights.block(block);
    weights.prefetch(next);
  });
  return taken;
}

checkpoint::Fingerprint fingerprint_of(const Session& session, const CalibrationSet& calibration) {
  // Where a result is put, on how many ranks and how often it is saved does not change it.
  static const std::set<std::string> kIrrelevant{
      "output", "residency", "scratch.directory", "scratch.memory_gib", "ranks.stages", "ranks.replicas",
      "ranks.threads", "ranks.watchdog_s", "ranks.activation_gib", "checkpoint.every_blocks",
      "checkpoint.keep", "compute_dtype", "quantization.allocation", "plan.cluster",
      // The files themselves are told apart below.
      "model", "calibration.tokens",
      // evaluation.json says what it was made on.
      "evaluation.tokens", "evaluation.window", "evaluation.windows"};
  checkpoint::Fingerprint fingerprint;
  for (const auto& [key, value] : session.config.flatten())
    if (!kIrrelevant.contains(key)) fingerprint[key] = value;
  fingerprint[kThreadsOfFingerprint] = std::to_string(session.threads);
  fingerprint["compute_dtype (resolved)"] = c10::toString(session.dtype);
  fingerprint["kernels (of this machine)"] =
      session.device.is_cpu() ? kernels::implementation_of(session.dtype) : "cuda";
  fingerprint["quantization.allocation (digest)"] = session.config.quantization.allocated.digest;
  fingerprint["model files"] = session.source->tensors().fingerprint();
  fingerprint["calibration tokens"] = calibration.tokens.digest;
  return fingerprint;
}

}  // namespace isobath::pipeline
