#include <isobath/pipeline/prediction.hpp>

#include <sys/resource.h>

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
  return plan.evaluate ? &*plan.evaluate : nullptr;
}

/// Host memory of the largest rank in a stage.
double host_bytes(const plan::Plan& plan, const std::string& stage) {
  double most = 0;
  const auto consider = [&](const std::vector<plan::RankMemory>& ranks) {
    for (const plan::RankMemory& memory : ranks)
      most = std::max(most, memory.host_bytes() + memory.root_bytes +
                                (plan.cluster.has_devices() ? 0 : memory.device_bytes()));
  };
  if (stage == "measure") consider(plan.measure_memory);
  if (stage == "quantize") {
    consider(plan.quantize_memory);
    consider(plan.reestimation_memory);
  }
  if (stage == "evaluate") consider(plan.evaluate_memory);
  return most;
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
  const int64_t measured_bytes = session_.world().all_reduce(peak_memory_bytes(), comm::Reduce::max);
  const plan::StageTime* time = time_of(*plan_, stage);
  if (time == nullptr) return;
  peak_bytes_ = std::max(peak_bytes_, host_bytes(*plan_, stage));
  rows_.push_back({stage, time->total_s(), measured_s, peak_bytes_, static_cast<double>(measured_bytes)});
  events.write("cost", {{"stage", stage},
                        {"predicted_s", time->total_s()},
                        {"measured_s", measured_s},
                        {"predicted_peak_bytes", peak_bytes_},
                        {"measured_peak_bytes", measured_bytes}});
}

std::string Prediction::text() const {
  if (rows_.empty()) return {};
  report::Table table(
      {"stage", "predicted s", "measured s", "measured / predicted", "predicted GiB", "measured GiB"});
  for (const Row& row : rows_)
    table.add({row.stage, fmt::format("{:.1f}", row.predicted_s), fmt::format("{:.1f}", row.measured_s),
               fmt::format("{:.2f}", row.measured_s / std::max(row.predicted_s, 1e-3)),
               row.predicted_bytes > 0 ? fmt::format("{:.2f}", row.predicted_bytes / kGiB) : "-",
               fmt::format("{:.2f}", row.measured_bytes / kGiB)});
  return table.text();
}

}  // namespace isobath::pipeline
