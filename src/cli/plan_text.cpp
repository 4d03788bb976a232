#include <isobath/cli/plan.hpp>
#include <isobath/report/table.hpp>

namespace isobath::cli {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

std::string gib(double bytes) {
  return bytes == 0 ? "0" : fmt::format("{:.2f}", bytes / kGiB);
}

std::string duration(double seconds) {
  if (seconds < 0.05) return seconds == 0 ? "0" : "<0.1 s";
  if (seconds < 120) return fmt::format("{:.1f} s", seconds);
  if (seconds < 7200) return fmt::format("{:.1f} min", seconds / 60);
  return fmt::format("{:.1f} h", seconds / 3600);
}

/// One row a pipeline stage. Stages that differ only in what is in flight, which falls from stage to stage,
/// share the row of the first.
std::string memory_table(const std::string& title, const plan::Plan& plan,
                         const std::vector<plan::RankMemory>& stages) {
  if (stages.empty()) return {};
  std::vector<std::string> names;
  for (const plan::RankMemory& memory : stages)
    for (const auto& item : memory.items)
      if (std::find(names.begin(), names.end(), item.name) == names.end()) names.push_back(item.name);
  std::vector<std::string> header{title + ", stage", "blocks"};
  header.insert(header.end(), names.begin(), names.end());
  if (plan.cluster.has_devices()) header.emplace_back("device");
  header.emplace_back("host");
  report::Table table(header);
  const auto is_alike = [](const plan::RankMemory& a, const plan::RankMemory& b) {
    for (size_t i = 0; i < a.items.size(); ++i) {
      const auto &x = a.items[i], &y = b.items[i];
      if (x.name != "in flight" && (x.device_bytes != y.device_bytes || x.host_bytes != y.host_bytes))
        return false;
    }
    return a.items.size() == b.items.size();
  };
  const auto cells = [&](const plan::RankMemory& memory) {
    std::vector<std::string> row;
    for (const std::string& name : names) {
      std::string cell = "0";
      for (const auto& item : memory.items)
        if (item.name == name) cell = gib(item.device_bytes + item.host_bytes);
      row.push_back(cell);
    }
    if (plan.cluster.has_devices()) row.push_back(gib(memory.device_bytes()));
    row.push_back(gib(memory.host_bytes() + (plan.cluster.has_devices() ? 0 : memory.device_bytes())));
    return row;
  };
  for (size_t first = 0; first < stages.size();) {
    size_t last = first;
    while (last + 1 < stages.size() && is_alike(stages[first], stages[last + 1])) ++last;
    std::vector<std::string> row{last == first ? fmt::format("{}", first) : fmt::format("{}-{}", first, last),
                                 fmt::format("{}", plan.blocks[first].size())};
    const std::vector<std::string> numbers = cells(stages[first]);
    row.insert(row.end(), numbers.begin(), numbers.end());
    table.add(row);
    first = last + 1;
  }
  return table.text();
}

void add_time(report::Table& table, const std::string& name, const plan::StageTime& time) {
  table.add({name, duration(time.compute_s), duration(time.idle_s), duration(time.communication_s),
             duration(time.disk_s), duration(time.total_s())});
}

}  // namespace

std::string plan_text(const config::RunConfig& config, const plan::Plan& plan) {
  const plan::Cluster& cluster = plan.cluster;
  std::string text =
      fmt::format("{} on {}: {} node{} x {} rank{}, {}\n", config.model,
                  cluster.name.empty() ? "the cluster" : cluster.name, cluster.nodes,
                  cluster.nodes == 1 ? "" : "s", cluster.ranks_per_node,
                  cluster.ranks_per_node == 1 ? "" : "s", plan.computes_bf16 ? "bfloat16" : "float32");
  text += fmt::format("{} x {} tokens, microbatch {}; the pipeline fills and drains {} time{}\n",
                      config.calibration.sequences, config.calibration.length, config.calibration.microbatch,
                      plan.segments, plan.segments == 1 ? "" : "s");
  text += fmt::format(
      "proposal: --set ranks.stages={} --set ranks.replicas={} --set residency={} --set "
      "calibration.microbatch={}\n\nmemory of a rank at its peak, GiB\n",
      plan.stages, plan.replicas, plan.residency, plan.proposed_microbatch);
  text += memory_table("measure", plan, plan.measure_memory);
  text += memory_table("quantize", plan, plan.quantize_memory);
  text += memory_table("evaluate", plan, plan.evaluate_memory);
  if (!plan.quantize_memory.empty() && plan.quantize_memory.front().root_bytes > 0)
    text += fmt::format("and up to {} GiB more on a rank that factorizes, {} on the ranks of a node\n",
                        gib(plan.quantize_memory.front().root_bytes),
                        gib(plan.quantize_memory.front().node_root_bytes));
  if (cluster.has_devices())
    text += fmt::format("largest device: {} of {:g} GiB ({}); ", gib(plan.need.device_bytes),
                        cluster.memory.device_gib, plan.need.device_stage);
  text += fmt::format("largest node: {} of {:g} GiB ({})\n\ntime\n", gib(plan.need.node_bytes),
                      cluster.memory.node_gib, plan.need.node_stage);

  report::Table times({"stage", "compute", "idle", "communication", "disk", "total"});
  add_time(times, "load", plan.load);
  if (plan.measure) add_time(times, "measure", *plan.measure);
  for (const plan::Plan::Policy& policy : plan.quantize)
    add_time(
        times,
        fmt::format("quantize, re-estimation {}{}", policy.name, policy.is_configured ? " (configured)" : ""),
        policy.time);
  if (plan.evaluate) add_time(times, "evaluate", *plan.evaluate);
  times.add({"the run as configured", "", "", "", "", duration(plan.total_s())});
  text += times.text() + "\n";

  const plan::StageTime& quantize = plan.configured_quantize();
  report::Table steps({"step of quantize", "time", "share"});
  for (const auto& [step, step_s] : quantize.parts)
    steps.add({step, duration(step_s), fmt::format("{:.1f} %", 100 * step_s / quantize.total_s())});
  text += steps.text();

  const plan::DiskNeed& disk = plan.disk;
  text += fmt::format(
      "\ndisk: reads {} GiB of checkpoint; writes {} GiB of model, {} of statistics, {} of re-estimations; a "
      "saved "
      "state takes {}, {:g} are kept; {} GiB in all\n",
      gib(disk.checkpoint_bytes), gib(disk.model_bytes), gib(disk.statistics_bytes),
      gib(disk.restatistics_bytes), gib(disk.generation_bytes), disk.keep, gib(disk.written_bytes()));
  for (const std::string& advice : plan.advice) text += "advice: " + advice + "\n";
  return text;
}

}  // namespace isobath::cli
