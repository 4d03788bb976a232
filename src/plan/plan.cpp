#include <isobath/plan/plan.hpp>

#include <isobath/core/error.hpp>
#include <isobath/quant/factor.hpp>
#include <limits>
#include <optional>

namespace isobath::plan {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;
constexpr int64_t kMostNodes = 256;

// Advice is given for what it would save of the run.
constexpr double kWorthSaying = 0.05;

struct GridShape {
  int stages, replicas;
};

/// All stages x replicas = n_ranks that the configuration and the model allow.
std::vector<GridShape> possible_grids(const config::RunConfig& config, const model::ModelConfig& model,
                                      int64_t n_ranks) {
  const config::Ranks& ranks = config.ranks;
  std::vector<GridShape> grids;
  for (int64_t stages = 1; stages <= std::min(n_ranks, model.n_blocks); ++stages) {
    const int64_t replicas = n_ranks / stages;
    if (stages * replicas != n_ranks) continue;
    if (ranks.stages != 0 && ranks.stages != stages) continue;
    // Of streamed stages one works at a time: a run makes one of them (pipeline/session.cpp).
    if (ranks.stages == 0 && config.residency == "streamed" && stages > 1) continue;
    if (ranks.replicas != 0 && ranks.replicas != replicas) continue;
    grids.push_back({static_cast<int>(stages), static_cast<int>(replicas)});
  }
  return grids;
}

/// The residencies that `config` allows, the one that a run prefers first.
std::vector<std::string> possible_residencies(const config::RunConfig& config) {
  if (config.residency == "auto" && config.quantization.tuning.epochs > 0) return {"resident"};
  if (config.residency == "auto") return {"resident", "streamed"};
  return {config.residency};
}

config::RunConfig with_residency(config::RunConfig config, const std::string& residency) {
  config.residency = residency;
  return config;
}

double total_s(const Job& job) {
  return load_time(job).total_s() + (job.is_weighted() ? measure_time(job).total_s() : 0) +
         quantize_time(job, job.config.quantization.reestimate).total_s() + tune_time(job).total_s() +
         (job.config.evaluation.tokens.empty() ? 0 : evaluate_time(job).total_s());
}

std::string policy_name(const config::Reestimate& reestimate) {
  if (reestimate.policy == "never") return "never";
  const std::string when =
      reestimate.blocks == 1 ? "every block" : fmt::format("every {} blocks", reestimate.blocks);
  return reestimate.policy == "drift" ? "at most " + when : when;
}

std::vector<Plan::Policy> quantize_policies(const Job& job) {
  const config::Reestimate configured = job.config.quantization.reestimate;
  std::vector<Plan::Policy> policies;
  const auto add = [&](config::Reestimate reestimate, bool is_configured) {
    reestimate.track = configured.track;
    reestimate.probe_sequences = configured.probe_sequences;
    for (const Plan::Policy& known : policies)
      if (known.name == policy_name(reestimate)) return;
    policies.push_back({policy_name(reestimate), is_configured, quantize_time(job, reestimate)});
  };
  add(configured, true);
  if (job.is_weighted()) {
    add({"never", 1}, false);
    add({"every", 8}, false);
    add({"every", 1}, false);
  }
  return policies;
}

DiskNeed disk_need(const Job& job) {
  DiskNeed disk;
  const double n_blocks = job.shapes.n_blocks;
  disk.checkpoint_bytes = n_blocks * job.stored_block_bytes() + job.stored_end_bytes();
  disk.model_bytes = job.stored_end_bytes();
  for (int64_t block = 0; block < job.model.n_blocks; ++block)
    disk.model_bytes += job.quantized_block_bytes(block);
  if (job.tunes()) disk.model_bytes *= 2;  // the untuned model goes when the other one is whole
  if (job.is_weighted()) {
    disk.statistics_bytes = n_blocks * job.token_weight_bytes();
    const config::Reestimate& reestimate = job.config.quantization.reestimate;
    if (reestimate.policy != "never")
      for (int64_t at = reestimate.blocks; at < job.model.n_blocks; at += reestimate.blocks)
        disk.restatistics_bytes += (n_blocks - static_cast<double>(at)) * job.token_weight_bytes();
  }
  if (job.uses_covariance()) disk.generation_bytes = job.hidden_bytes();
  if (job.tunes()) {  // what a scale became, and the two means of its gradient
    double scales = 0;
    for (int64_t block = 0; block < job.model.n_blocks; ++block) scales += job.scales_of_block(block);
    disk.generation_bytes = std::max(disk.generation_bytes, 12 * scales);
  }
  disk.keep = static_cast<double>(job.config.checkpoint.keep);
  disk.scratch_bytes = scratch_bytes(job);
  return disk;
}

/// Proposes the microbatch, and says what other settings would save.
void advise(const config::RunConfig& config, const model::ModelConfig& model, const Cluster& cluster,
            Plan& plan) {
  const double now_s = plan.total_s();
  /// Share of the time that a change saves; 0 where it does not fit.
  const auto saving = [&](const std::function<void(config::RunConfig&)>& change) {
    config::RunConfig other = config;
    change(other);
    const Job job(other, model, cluster, plan.stages, plan.replicas);
    return fits(memory_need(job), cluster) ? 1 - total_s(job) / now_s : 0.0;
  };
  const auto say = [&](const std::string& setting, double share) {
    if (share >= kWorthSaying)
      plan.advice.push_back(fmt::format("--set {} would save {:.0f} % of the time", setting, 100 * share));
  };
  const config::Calibration& calibration = config.calibration;
  double most = kWorthSaying;
  for (int64_t microbatch = 1; microbatch <= calibration.sequences; microbatch *= 2) {
    const double share = saving([&](config::RunConfig& other) { other.calibration.microbatch = microbatch; });
    if (share <= most) continue;
    most = share;
    plan.proposed_microbatch = microbatch;
  }
  if (plan.proposed_microbatch != calibration.microbatch)
    say(fmt::format("calibration.microbatch={}", plan.proposed_microbatch), most);

  const int64_t n_ranks = cluster.n_ranks(),
                n_shards = std::min(calibration.logical_shards, calibration.sequences);
  if (n_shards < n_ranks)
    plan.advice.push_back(
        fmt::format("{} logical shards keep only {} of {} ranks busy where sequences are shared", n_shards,
                    n_shards, n_ranks));
  // Fewer leave ranks idle; more are closed, one H each, on every rank.
  if (const int64_t shards = std::min(n_ranks, calibration.sequences); shards != n_shards)
    say(fmt::format("calibration.logical_shards={}", shards),
        saving([&](config::RunConfig& other) { other.calibration.logical_shards = shards; }));
  if (config.checkpoint.every_blocks == 1)
    say("checkpoint.every_blocks=8",
        saving([](config::RunConfig& other) { other.checkpoint.every_blocks = 8; }));
}

/// The grid on which the run is fastest, of those that fit; nothing where none does.
std::optional<GridShape> fastest_grid(const config::RunConfig& config, const model::ModelConfig& model,
                                      const Cluster& cluster) {
  double fastest = std::numeric_limits<double>::infinity();
  std::optional<GridShape> best;
  for (const GridShape& grid : possible_grids(config, model, cluster.n_ranks())) {
    const Job job(config, model, cluster, grid.stages, grid.replicas);
    if (!fits(memory_need(job), cluster)) continue;
    const double time = total_s(job);
    if (time >= fastest) continue;
    fastest = time;
    best = grid;
  }
  return best;
}

/// What these ranks could do without more memory: stream weights where that was not allowed, and block inputs
/// on a local disk; each ends with "; or ". Empty where neither helps, or both are configured.
std::string settings_that_fit(const config::RunConfig& config, const model::ModelConfig& model,
                              const Cluster& cluster) {
  const bool may_stream = config.residency != "resident";
  config::RunConfig other = with_residency(config, "streamed");
  if (!may_stream && fastest_grid(other, model, cluster)) return "residency: streamed on these ranks; or ";
  if (!config.scratch.directory.empty()) return {};
  other.scratch.directory = "DIR";
  const std::optional<GridShape> grid = fastest_grid(other, model, cluster);
  if (!grid) return {};
  const double bytes = scratch_bytes(Job(other, model, cluster, grid->stages, grid->replicas));
  return fmt::format(
      "on these ranks with {}--set scratch.directory=DIR (a local disk with {:.0f} GiB a node); or ",
      may_stream ? "" : "--set residency=streamed ", std::ceil(bytes / kGiB));
}

[[noreturn]] void refuse(const config::RunConfig& config, const model::ModelConfig& model,
                         const Cluster& cluster, const config::RunConfig& leanest) {
  // The grid that comes nearest, by the worst ratio of what it needs to what there is.
  double nearest = std::numeric_limits<double>::infinity();
  GridShape best{};
  MemoryNeed best_need;
  for (const GridShape& grid : possible_grids(leanest, model, cluster.n_ranks())) {
    const MemoryNeed need = memory_need(Job(leanest, model, cluster, grid.stages, grid.replicas));
    const double ratio =
        std::max(need.node_bytes / (cluster.memory.node_gib * kGiB),
                 cluster.has_devices() ? need.device_bytes / (cluster.memory.device_gib * kGiB) : 0);
    if (ratio >= nearest) continue;
    nearest = ratio;
    best = grid;
    best_need = need;
  }
  std::string problem, more_memory;
  const auto lacks = [&](const char* what, double needed_bytes, const std::string& stage, double gib) {
    if (needed_bytes <= kUsableShare * gib * kGiB) return;
    problem += fmt::format("\n  a {} needs {:.1f} GiB in {}; of its {:g} GiB {:.1f} may be used", what,
                           needed_bytes / kGiB, stage, gib, kUsableShare * gib);
    more_memory += fmt::format("{}{:.0f} GiB a {}", more_memory.empty() ? "" : " and ",
                               std::ceil(needed_bytes / kGiB / kUsableShare), what);
  };
  if (cluster.has_devices())
    lacks("device", best_need.device_bytes, best_need.device_stage, cluster.memory.device_gib);
  lacks("node", best_need.node_bytes, best_need.node_stage, cluster.memory.node_gib);
  config::RunConfig any_grid = config;
  any_grid.ranks.stages = any_grid.ranks.replicas = 0;
  const int64_t nodes = smallest_cluster(any_grid, model, cluster, kMostNodes);
  const std::string more_nodes = nodes > 0
                                     ? fmt::format("{} node{} ({} ranks) of this kind", nodes,
                                                   nodes == 1 ? "" : "s", nodes * cluster.ranks_per_node)
                                     : fmt::format("no number of nodes up to {} of this kind", kMostNodes);
  fail<ConfigError>(
      "the run does not fit {} rank{} on {} node{} ({}); nearest is stages {} x replicas {}:{}\n"
      "smallest that would do: {}{}; or these ranks with {}",
      cluster.n_ranks(), cluster.n_ranks() == 1 ? "" : "s", cluster.nodes, cluster.nodes == 1 ? "" : "s",
      cluster.name, best.stages, best.replicas, problem, settings_that_fit(config, model, cluster),
      more_nodes, more_memory);
}

}  // namespace

const StageTime& Plan::configured_quantize() const {
  for (const Policy& policy : quantize)
    if (policy.is_configured) return policy.time;
  contract_violated("quantize", "a plan has its configured policy");
}

double Plan::total_s() const {
  return load.total_s() + (measure ? measure->total_s() : 0) + configured_quantize().total_s() +
         (tune ? tune->total_s() : 0) + (evaluate ? evaluate->total_s() : 0);
}

Plan plan_of(const config::RunConfig& config, const model::ModelConfig& model, const Cluster& cluster,
             int stages, int replicas) {
  const Job job(config, model, cluster, stages, replicas);
  const bool evaluates = !config.evaluation.tokens.empty();
  Plan plan{.cluster = cluster,
            .stages = stages,
            .replicas = replicas,
            .residency = config.residency,
            .computes_bf16 = job.computes_bf16,
            .blocks = job.layout.blocks,
            .segments = job.layout.segments,
            .proposed_microbatch = config.calibration.microbatch};
  for (int stage = 0; stage < stages; ++stage) {
    if (job.is_weighted()) plan.measure_memory.push_back(measure_memory(job, stage));
    plan.quantize_memory.push_back(quantize_memory(job, stage));
    if (job.reestimates()) plan.reestimation_memory.push_back(reestimation_memory(job, stage));
    if (job.tunes()) plan.tune_memory.push_back(tune_memory(job, stage));
    if (evaluates) plan.evaluate_memory.push_back(evaluate_memory(job, stage));
  }
  plan.need = memory_need(job);
  plan.load = load_time(job);
  if (job.is_weighted()) plan.measure = measure_time(job);
  if (job.tunes()) plan.tune = tune_time(job);
  if (evaluates) plan.evaluate = evaluate_time(job);
  plan.quantize = quantize_policies(job);
  plan.disk = disk_need(job);
  return plan;
}

std::string too_wide_to_hold(const config::RunConfig& config, const model::ModelConfig& model) {
  std::string lines;
  if (!needs_whole(config.quantization)) return lines;
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    const int64_t n_channels = model::module_shape(model, projection).columns;
    if (n_channels > quant::kLargestWhole)
      lines += fmt::format(
          "\n  {}: {} input channels; gptaq and act_order need its covariance whole on one "
          "rank, which is done for at most {}; use qep and no act_order",
          model::name_of(projection), n_channels, quant::kLargestWhole);
  }
  return lines;
}

Plan make_plan(const config::RunConfig& config, const model::ModelConfig& model, const Cluster& cluster) {
  if (const std::string lines = too_wide_to_hold(config, model); !lines.empty())
    fail<ConfigError>("the configuration does not fit the model:{}", lines);
  if (possible_grids(config, model, cluster.n_ranks()).empty())
    fail<ConfigError>(
        "no stages x replicas make {} ranks with ranks.stages = {}, ranks.replicas = {} (0: auto) and {} "
        "blocks; "
        "use auto, or another number of ranks",
        cluster.n_ranks(), config.ranks.stages, config.ranks.replicas, model.n_blocks);
  config::RunConfig chosen;
  for (const std::string& residency : possible_residencies(config)) {
    chosen = with_residency(config, residency);
    const std::optional<GridShape> grid = fastest_grid(chosen, model, cluster);
    if (!grid) continue;
    Plan plan = plan_of(chosen, model, cluster, grid->stages, grid->replicas);
    advise(chosen, model, cluster, plan);
    return plan;
  }
  // The residency that takes the least memory came last.
  refuse(config, model, cluster, chosen);
}

int64_t smallest_cluster(const config::RunConfig& config, const model::ModelConfig& model,
                         const Cluster& cluster, int64_t most) {
  for (int64_t nodes = 1; nodes <= most; ++nodes) {
    const Cluster larger = with_ranks(cluster, nodes * cluster.ranks_per_node);
    for (const std::string& residency : possible_residencies(config)) {
      const config::RunConfig chosen = with_residency(config, residency);
      for (const GridShape& grid : possible_grids(chosen, model, larger.n_ranks()))
        if (fits(memory_need(Job(chosen, model, larger, grid.stages, grid.replicas)), larger)) return nodes;
    }
  }
  return 0;
}

}  // namespace isobath::plan
