#include <isobath/cli/plan.hpp>

#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>
#include <nlohmann/json.hpp>

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr int64_t kMaxClusterBytes = int64_t{1} << 20;

fs::path model_directory(const config::RunConfig& config, const std::string& model_config) {
  if (model_config.empty()) {
    if (!fs::exists(fs::path(config.model) / "config.json"))
      fail<ConfigError>(
          "{} has no config.json; download it, or name a file of the same shapes with --model-config "
          "(configs/models/ has some)",
          config.model);
    return config.model;
  }
  const fs::path path = model_config;
  if (fs::is_directory(path)) return path;
  if (path.filename() != "config.json" || !fs::is_regular_file(path))
    fail<ConfigError>("--model-config {}: expected a config.json or a directory that holds one, found {}",
                      model_config, fs::exists(path) ? "another file" : "nothing");
  return path.parent_path().empty() ? fs::path(".") : path.parent_path();
}

ordered_json to_json(const plan::StageTime& time) {
  ordered_json json{{"stage", time.name},
                    {"seconds", time.total_s()},
                    {"compute_s", time.compute_s},
                    {"idle_s", time.idle_s},
                    {"communication_s", time.communication_s},
                    {"disk_s", time.disk_s}};
  for (const auto& [step, step_s] : time.parts) json["steps"][step] = step_s;
  return json;
}

ordered_json to_json(const std::vector<plan::RankMemory>& stages) {
  ordered_json list = ordered_json::array();
  for (const plan::RankMemory& memory : stages) {
    ordered_json entry{{"device_bytes", memory.device_bytes()},
                       {"host_bytes", memory.host_bytes()},
                       {"factorizing_extra_bytes", memory.root_bytes}};
    for (const auto& item : memory.items)
      entry["items"][item.name] = {{"device_bytes", item.device_bytes}, {"host_bytes", item.host_bytes}};
    list.push_back(std::move(entry));
  }
  return list;
}

}  // namespace

plan::Plan plan_run(const config::RunConfig& config, const PlanRequest& request) {
  const std::string path = request.cluster.empty() ? config.plan.cluster : request.cluster;
  if (path.empty())
    fail<ConfigError>(
        "plan needs a cluster: name a description with --cluster or in plan.cluster (configs/clusters/ has "
        "some, "
        "`isobath plan --calibrate` measures this machine)");
  if (!fs::is_regular_file(path))
    fail<ConfigError>("{}: expected a cluster description, found {}", path,
                      fs::exists(path) ? "something else" : "nothing");
  plan::Cluster cluster = plan::parse_cluster(io::read_text(path, kMaxClusterBytes), path);
  if (request.n_ranks > 0) cluster = plan::with_ranks(cluster, request.n_ranks);
  return plan::make_plan(config, model::read_model_config(model_directory(config, request.model_config)),
                         cluster);
}

std::string plan_json(const config::RunConfig& config, const plan::Plan& plan) {
  ordered_json json{{"model", config.model},
                    {"cluster", plan.cluster.name},
                    {"nodes", plan.cluster.nodes},
                    {"ranks", plan.cluster.n_ranks()},
                    {"stages", plan.stages},
                    {"replicas", plan.replicas},
                    {"residency", plan.residency},
                    {"microbatch", config.calibration.microbatch},
                    {"proposed_microbatch", plan.proposed_microbatch},
                    {"compute_dtype", plan.computes_bf16 ? "bfloat16" : "float32"},
                    {"seconds", plan.total_s()},
                    {"device_bytes", plan.need.device_bytes},
                    {"node_bytes", plan.need.node_bytes}};
  for (const Range& range : plan.blocks) json["blocks"].push_back({range.begin, range.end});
  json["load"] = to_json(plan.load);
  if (plan.measure) json["measure"] = to_json(*plan.measure);
  for (const plan::Plan::Policy& policy : plan.quantize) {
    ordered_json entry = to_json(policy.time);
    entry["reestimate"] = policy.name;
    entry["configured"] = policy.is_configured;
    json["quantize"].push_back(std::move(entry));
  }
  if (plan.tune) json["tune"] = to_json(*plan.tune);
  if (plan.evaluate) json["evaluate"] = to_json(*plan.evaluate);
  json["memory"] = {{"measure", to_json(plan.measure_memory)},
                    {"quantize", to_json(plan.quantize_memory)},
                    {"reestimation", to_json(plan.reestimation_memory)},
                    {"tune", to_json(plan.tune_memory)},
                    {"evaluate", to_json(plan.evaluate_memory)}};
  json["disk"] = {{"checkpoint_bytes", plan.disk.checkpoint_bytes},
                  {"statistics_bytes", plan.disk.statistics_bytes},
                  {"restatistics_bytes", plan.disk.restatistics_bytes},
                  {"generation_bytes", plan.disk.generation_bytes},
                  {"generations_kept", plan.disk.keep},
                  {"model_bytes", plan.disk.model_bytes},
                  {"written_bytes", plan.disk.written_bytes()},
                  {"scratch_bytes_per_node", plan.disk.scratch_bytes}};
  json["advice"] = plan.advice;
  return json.dump(2) + "\n";
}

}  // namespace isobath::cli
