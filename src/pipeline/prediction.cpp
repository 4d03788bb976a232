#include <isobath/pipeline/prediction.hpp>

#include <sys/resource.h>

#include <functional>
#include <isobath/io/files.hpp>
#include <isobath/report/table.hpp>
#include <nlohmann/json.hpp>

namespace isobath::pipeline {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;
constexpr int64_t kMaxClusterBytes = int64_t{1} << 20;

const plan::StageTime* time_of(const plan::Plan& plan, const std::string& stage) {
  if (stage == "load") return &plan.load;
  if (stage == "measure") return plan.measure ? &*plan.measure : nullptr;
  if (stage == "quantize") return &plan.configured_quantize();
  if (stage == "tune") return plan.tune ? &*plan.tune : nullptr;
  return plan.evaluate ? &*plan.evaluate : nullptr;
}

/// The most of what `bytes_of` says of the ranks in a stage.
double most_of(const plan::Plan& plan, const std::string& stage,
               const std::function<double(const plan::RankMemory&)>& bytes_of) {
  double most = 0;
  const auto consider = [&](const std::vector<plan::RankMemory>& ranks) {
    for (const plan::RankMemory& memory : ranks) most = std::max(most, bytes_of(memory));
  };
  if (stage == "measure") consider(plan.measure_memory);
  if (stage == "quantize") {
    consider(plan.quantize_memory);
    consider(plan.reestimation_memory);
  }
  if (stage == "tune") consider(plan.tune_memory);
  if (stage == "evaluate") consider(plan.evaluate_memory);
  return most;
}

double host_bytes(const plan::Plan& plan, const std::string& stage) {
  return most_of(plan, stage, [&](const plan::RankMemory& memory) {
    return memory.host_bytes() + memory.root_bytes + (plan.cluster.has_devices() ? 0 : memory.device_bytes());
  });
}

/// Of tensors: without the context of the process.
double device_bytes(const plan::Plan& plan, const std::string& stage) {
  return most_of(plan, stage, [](const plan::RankMemory& memory) {
    double bytes = 0;
    for (const plan::RankMemory::Item& item : memory.items)
      if (item.name != "process") bytes += item.device_bytes;
    return bytes;
  });
}

}  // namespace

int64_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{1024} * usage.ru_maxrss;
}

Prediction::Prediction(const Session& session) : session_(session) {
  const std::string& path = session.config.plan.cluster;
  if (path.empty()) return;
  const comm::Communicator& world = session.world();
  std::string text;
  world.agree_on([&] {
    if (world.rank() != 0) return;
    if (!std::filesystem::is_regular_file(path))
      fail<ConfigError>(
          "plan.cluster: {}: expected a cluster description, found {}; `isobath plan "
          "--calibrate --output {}` measures one",
          path, std::filesystem::exists(path) ? "something else" : "nothing", path);
    text = io::read_text(path, kMaxClusterBytes);
  });
  world.broadcast(text, 0);
  world.agree_on([&] {
    const plan::Cluster cluster = plan::with_ranks(plan::parse_cluster(text, path), world.size());
    plan_ = plan::plan_of(session.config, session.model(), cluster, session.grid->shape().stages,
                          session.grid->shape().replicas);
  });
}

void Prediction::record(const std::string& stage, double measured_s, report::EventLog& events) {
  if (!plan_) return;
  const comm::Communicator& world = session_.world();
  const int64_t measured_bytes = world.all_reduce(peak_memory_bytes(), comm::Reduce::max);
  const int64_t device_peak = world.all_reduce(comm::device_peak_bytes(session_.device), comm::Reduce::max);
  const plan::StageTime* time = time_of(*plan_, stage);
  if (time == nullptr) return;
  peak_bytes_ = std::max(peak_bytes_, host_bytes(*plan_, stage));
  device_peak_bytes_ = std::max(device_peak_bytes_, device_bytes(*plan_, stage));
  rows_.push_back({stage, time->total_s(), measured_s, peak_bytes_, static_cast<double>(measured_bytes),
                   device_peak_bytes_, static_cast<double>(device_peak)});
  nlohmann::json cost{{"stage", stage},
                      {"predicted_s", time->total_s()},
                      {"measured_s", measured_s},
                      {"predicted_peak_bytes", peak_bytes_},
                      {"measured_peak_bytes", measured_bytes}};
  if (session_.device.is_cuda()) {
    cost["predicted_device_peak_bytes"] = device_peak_bytes_;
    cost["measured_device_peak_bytes"] = device_peak;
  }
  events.write("cost", cost);
}

std::string Prediction::text() const {
  if (rows_.empty()) return {};
  const bool has_devices = session_.device.is_cuda();
  std::vector<std::string> columns{"stage",         "predicted s", "measured s", "measured / predicted",
                                   "predicted GiB", "measured GiB"};
  if (has_devices) columns.insert(columns.end(), {"device: predicted GiB", "measured GiB"});
  report::Table table(columns);
  const auto gib = [](double bytes) { return bytes > 0 ? fmt::format("{:.2f}", bytes / kGiB) : "-"; };
  for (const Row& row : rows_) {
    std::vector<std::string> cells{row.stage,
                                   fmt::format("{:.1f}", row.predicted_s),
                                   fmt::format("{:.1f}", row.measured_s),
                                   fmt::format("{:.2f}", row.measured_s / std::max(row.predicted_s, 1e-3)),
                                   gib(row.predicted_bytes),
                                   gib(row.measured_bytes)};
    if (has_devices)
      cells.insert(cells.end(), {gib(row.predicted_device_bytes), gib(row.measured_device_bytes)});
    table.add(cells);
  }
  return table.text();
}

}  // namespace isobath::pipeline
