#include <algorithm>
#include <functional>
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

/// Bytes of one kind in a table of memory: of an item, or of all of them.
struct Column {
  std::string title;
  std::function<double(const plan::RankMemory&)> bytes;
};

double bytes_of(const plan::RankMemory& memory, const std::string& name,
                double plan::RankMemory::Item::*place) {
  for (const plan::RankMemory::Item& item : memory.items)
    if (item.name == name) return item.*place;
  return 0;
}

/// Items on the device and their sum, then those on the host and theirs; without devices one sum. Items that
/// no stage has are left out.
std::vector<Column> columns_of(const std::vector<plan::RankMemory>& stages, bool has_devices) {
  std::vector<std::string> names;
  for (const plan::RankMemory& memory : stages)
    for (const auto& item : memory.items)
      if (std::find(names.begin(), names.end(), item.name) == names.end()) names.push_back(item.name);
  std::vector<Column> columns;
  const auto add = [&](Column column) {
    if (std::any_of(stages.begin(), stages.end(),
                    [&](const plan::RankMemory& memory) { return column.bytes(memory) > 0; }))
      columns.push_back(std::move(column));
  };
  using Item = plan::RankMemory::Item;
  if (!has_devices) {
    for (const std::string& name : names)
      add({name, [name](const plan::RankMemory& memory) {
             return bytes_of(memory, name, &Item::device_bytes) + bytes_of(memory, name, &Item::host_bytes);
           }});
    add({"host", [](const plan::RankMemory& memory) { return memory.device_bytes() + memory.host_bytes(); }});
    return columns;
  }
  for (const std::string& name : names)
    add({name,
         [name](const plan::RankMemory& memory) { return bytes_of(memory, name, &Item::device_bytes); }});
  add({"device", [](const plan::RankMemory& memory) { return memory.device_bytes(); }});
  for (const std::string& name : names)
    add({"host: " + name,
         [name](const plan::RankMemory& memory) { return bytes_of(memory, name, &Item::host_bytes); }});
  add({"host", [](const plan::RankMemory& memory) { return memory.host_bytes(); }});
  return columns;
}

/// One row a pipeline stage. Stages that differ only in what is in flight, which falls from stage to stage,
/// share the row of the first.
std::string memory_table(const std::string& title, const plan::Plan& plan,
                         const std::vector<plan::RankMemory>& stages) {
  if (stages.empty()) return {};
  const std::vector<Column> columns = columns_of(stages, plan.cluster.has_devices());
  std::vector<std::string> header{title + ", stage", "blocks"};
  for (const Column& column : columns) header.push_back(column.title);
  report::Table table(header);
  const auto is_alike = [](const plan::RankMemory& a, const plan::RankMemory& b) {
    if (a.items.size() != b.items.size()) return false;
    for (size_t i = 0; i < a.items.size(); ++i) {
      const auto &x = a.items[i], &y = b.items[i];
      if (x.name != "in flight" && (x.device_bytes != y.device_bytes || x.host_bytes != y.host_bytes))
        return false;
    }
    return true;
  };
  for (size_t first = 0; first < stages.size();) {
    size_t last = first;
    while (last + 1 < stages.size() && is_alike(stages[first], stages[last + 1])) ++last;
    std::vector<std::string> row{last == first ? fmt::format("{}", first) : fmt::format("{}-{}", first, last),
                                 fmt::format("{}", plan.blocks[first].size())};
    for (const Column& column : columns) row.push_back(gib(column.bytes(stages[first])));
    table.add(row);
    first = last + 1;
  }
  return table.text();
}

void add_time(report::Table& table, const std::string& name, const plan::StageTime& time) {
  table.add({name, duration(time.compute_s), duration(time.idle_s), duration(time.communication_s),
             duration(time.disk_s), duration(time.total_s())});
}

std::string time_table(const plan::Plan& plan) {
  report::Table times({"stage", "compute", "idle", "communication", "disk", "total"});
  // Streamed weights are read by the stages that use them.
  if (plan.load.total_s() > 0) add_time(times, "load", plan.load);
  if (plan.measure) add_time(times, "measure", *plan.measure);
  for (const plan::Plan::Policy& policy : plan.quantize)
    add_time(
        times,
        fmt::format("quantize, re-estimation {}{}", policy.name, policy.is_configured ? " (configured)" : ""),
        policy.time);
  if (plan.tune) add_time(times, "tune", *plan.tune);
  if (plan.evaluate) add_time(times, "evaluate", *plan.evaluate);
  times.add({"the run as configured", "", "", "", "", duration(plan.total_s())});
  return times.text();
}

/// Steps below half a percent are shown as one.
std::string step_table(const plan::StageTime& quantize) {
  constexpr double kSmallestShare = 0.005;
  report::Table steps({"step of quantize", "time", "share"});
  const auto add = [&](const std::string& step, double step_s) {
    steps.add({step, duration(step_s), fmt::format("{:.1f} %", 100 * step_s / quantize.total_s())});
  };
  double others_s = 0;
  for (const auto& [step, step_s] : quantize.parts) {
    if (step_s < kSmallestShare * quantize.total_s())
      others_s += step_s;
    else
      add(step, step_s);
  }
  if (others_s > 0) add("other steps", others_s);
  return steps.text();
}

/// As a shell reads it back.
std::string quoted(const std::string& word) {
  const auto is_plain = [](char c) {
    return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || ('0' <= c && c <= '9') ||
           std::string_view("_./=:,+@%-").find(c) != std::string_view::npos;
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), is_plain)) return word;
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

/// The command that runs what was planned: the settings it was planned with, then those that it proposes.
std::string run_command(const plan::Plan& plan, const ConfigSource& source) {
  const std::vector<std::string> proposed{fmt::format("ranks.stages={}", plan.stages),
                                          fmt::format("ranks.replicas={}", plan.replicas),
                                          fmt::format("residency={}", plan.residency),
                                          fmt::format("calibration.microbatch={}", plan.proposed_microbatch)};
  const auto key_of = [](const std::string& setting) { return setting.substr(0, setting.find('=')); };
  std::string command = fmt::format("mpirun -n {}{} isobath run {}", plan.cluster.n_ranks(),
                                    plan.cluster.nodes > 1 ? " --hostfile HOSTS" : "", quoted(source.path));
  for (const std::string& setting : source.settings)
    if (std::none_of(proposed.begin(), proposed.end(),
                     [&](const std::string& other) { return key_of(other) == key_of(setting); }))
      command += " --set " + quoted(setting);
  for (const std::string& setting : proposed) command += " --set " + setting;
  return command;
}

std::string disk_text(const config::RunConfig& config, const plan::DiskNeed& disk) {
  std::string text = fmt::format(
      "disk: reads {} GiB of checkpoint; writes {} GiB of model, {} of statistics, {} of re-estimations",
      gib(disk.checkpoint_bytes), gib(disk.model_bytes), gib(disk.statistics_bytes),
      gib(disk.restatistics_bytes));
  if (disk.generation_bytes > 0)
    text += fmt::format(", {} of saved states ({} each: {:g} are kept while another is written)",
                        gib((disk.keep + 1) * disk.generation_bytes), gib(disk.generation_bytes), disk.keep);
  text += fmt::format("; {} GiB written in all\n", gib(disk.written_bytes()));
  if (disk.scratch_bytes > 0)
    text += fmt::format("scratch: {} GiB a node in {}\n", gib(disk.scratch_bytes), config.scratch.directory);
  return text;
}

}  // namespace

std::string plan_text(const config::RunConfig& config, const plan::Plan& plan, const ConfigSource& source) {
  const plan::Cluster& cluster = plan.cluster;
  std::string text =
      fmt::format("{} on {}: {} node{} x {} rank{}, {}\n", config.model,
                  cluster.name.empty() ? "the cluster" : cluster.name, cluster.nodes,
                  cluster.nodes == 1 ? "" : "s", cluster.ranks_per_node,
                  cluster.ranks_per_node == 1 ? "" : "s", plan.computes_bf16 ? "bfloat16" : "float32");
  text += fmt::format("total time: {}; ", duration(plan.total_s()));
  if (cluster.has_devices())
    text += fmt::format("largest device: {} of {:g} GiB ({}); ", gib(plan.need.device_bytes),
                        cluster.memory.device_gib, plan.need.device_stage);
  text += fmt::format("largest node: {} of {:g} GiB ({})\n", gib(plan.need.node_bytes),
                      cluster.memory.node_gib, plan.need.node_stage);
  text += fmt::format("{} x {} tokens, microbatch {}, {} stage{} x {} replica{}, {} weights",
                      config.calibration.sequences, config.calibration.length, config.calibration.microbatch,
                      plan.stages, plan.stages == 1 ? "" : "s", plan.replicas, plan.replicas == 1 ? "" : "s",
                      plan.residency);
  if (plan.stages > 1 && plan.residency != "streamed")
    text += fmt::format("; the pipeline fills and drains {} time{}", plan.segments,
                        plan.segments == 1 ? "" : "s");
  text += fmt::format("\nto run it:\n  {}\n\nmemory of a rank at its peak, GiB\n", run_command(plan, source));
  text += memory_table("measure", plan, plan.measure_memory);
  text += memory_table("quantize", plan, plan.quantize_memory);
  text += memory_table("re-estimation", plan, plan.reestimation_memory);
  text += memory_table("tune", plan, plan.tune_memory);
  text += memory_table("evaluate", plan, plan.evaluate_memory);
  if (!plan.quantize_memory.empty() && plan.quantize_memory.front().root_bytes > 0)
    text += fmt::format(
        "and up to {} GiB more of the host on a rank that factorizes, {} on the ranks of a node\n",
        gib(plan.quantize_memory.front().root_bytes), gib(plan.quantize_memory.front().node_root_bytes));
  text += "\ntime\n" + time_table(plan) + "\n" + step_table(plan.configured_quantize()) + "\n" +
          disk_text(config, plan.disk);
  for (const std::string& advice : plan.advice) text += "advice: " + advice + "\n";
  return text;
}

}  // namespace isobath::cli
