#include <isobath/pipeline/allocate.hpp>

#include <fmt/ranges.h>

#include <cmath>
#include <isobath/comm/watchdog.hpp>
#include <isobath/config/allocation_file.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/version.hpp>
#include <isobath/io/files.hpp>
#include <isobath/pipeline/measure.hpp>
#include <isobath/pipeline/session.hpp>

#include "allocation_problem.hpp"

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;
using allocate::QuadraticLoss;
using allocate::Selection;

/// What statistics must share with the configuration; how they were cut and computed does not matter here.
StatisticsHeader identity(const StatisticsHeader& header) {
  StatisticsHeader kept;
  for (const char* name : {"format", "model", "tokens", "n_sequences", "length", "loss", "samples"})
    kept[name] = header.at(name);
  return kept;
}

int64_t extreme_cost(const AllocationProblem& problem, bool largest) {
  int64_t total = 0;
  for (size_t set = 0; set < problem.sets.size(); ++set) {
    const auto begin = problem.candidates.cost.begin();
    const auto [low, high] =
        std::minmax_element(begin + problem.candidates.first[set], begin + problem.candidates.first[set + 1]);
    total += largest ? *high : *low;
  }
  return total;
}

int64_t budget_in_bits(const AllocationProblem& problem, const AllocateRequest& request) {
  const int64_t least = extreme_cost(problem, false), most = extreme_cost(problem, true);
  const bool in_bytes = request.bytes > 0;
  const auto budget = in_bytes ? static_cast<double>(request.bytes) * 8
                               : request.mean_bits * static_cast<double>(problem.n_weights);
  // Half a bit of slack in all: 3.25 times a number of weights need not be an integer in f64.
  const auto bits = static_cast<int64_t>(std::floor(budget + 0.5));
  if (bits >= least && bits <= most) return bits;
  if (in_bytes)
    fail<ConfigError>(
        "--budget-bytes: expected {} (all at the smallest width) to {} (all at the largest), found {}",
        (least + 7) / 8, (most + 7) / 8, request.bytes);
  fail<ConfigError>(
      "--budget: expected {:.4f} (all linears at the smallest width, scales included) to {:.4f} (all at the "
      "largest) bits a weight, found {}",
      problem.mean_bits(least), problem.mean_bits(most), request.mean_bits);
}

std::optional<Selection> widest_uniform(const AllocationProblem& problem) {
  std::optional<Selection> best;
  int64_t most = -1;
  for (const int64_t bits : {2, 3, 4, 5, 6, 8}) {
    Selection selection;
    for (size_t set = 0; set < problem.sets.size(); ++set) {
      const std::vector<int64_t>& widths = problem.sets[set].bits;
      // A set that overrides give its width keeps it.
      const auto found = widths.size() == 1 ? widths.begin() : std::ranges::find(widths, bits);
      if (found != widths.end())
        selection.push_back(problem.candidates.first[set] + (found - widths.begin()));
    }
    if (selection.size() < problem.sets.size()) continue;
    const int64_t cost = cost_of(problem.candidates, selection);
    if (cost > problem.candidates.budget || cost <= most) continue;
    most = cost;
    best = std::move(selection);
  }
  return best;
}

/// Fills in what the choices are worth on other sequences. as_found: the loss without the prior.
void validate(const QuadraticLoss& as_found, AllocationReport& report) {
  const AllocationProblem& problem = report.problem;
  const allocate::Candidates& candidates = problem.candidates;
  constexpr int64_t kLeastSequences = 4;
  const bool has_folds = problem.scores.n_sequences() >= kLeastSequences;
  for (Allocation& allocation : report.methods) {
    if (allocation.method != "quadratic" && allocation.method != "diagonal")
      allocation.held_out = as_found(allocation.selection);
    else if (has_folds && allocation.method == "quadratic")
      allocation.held_out = held_out_loss(problem.scores, candidates, [&](const QuadraticLoss& loss) {
        return minimise(loss, candidates, relax(loss, candidates), {});
      });
    else if (has_folds)
      allocation.held_out = held_out_loss(
          problem.scores.without_prior(), candidates,
          [&](const QuadraticLoss& loss) { return solve_knapsack(candidates, loss.diagonal()); });
  }
  if (report.uniform) report.uniform->held_out = as_found(report.uniform->selection);
}

AllocationReport solve(const AllocationProblem& problem, const QuadraticLoss& loss,
                       const std::string& method) {
  const std::vector<double> diagonal = loss.diagonal();
  const auto described = [&](const std::string& name, Selection selection) {
    const double predicted = loss(selection), additive = allocate::sum_of(selection, diagonal);
    return Allocation{name, std::move(selection), predicted, additive, {}};
  };
  AllocationReport report{.problem = problem, .loss = loss, .methods = {}, .uniform = {}};
  std::vector<Allocation> additive;
  for (const std::string& name : allocation_methods()) {
    if (name == method) report.chosen = report.methods.size() + additive.size();
    if (name == "quadratic") continue;
    additive.push_back(described(name, solve_knapsack(problem.candidates, problem.scored.at(name))));
  }
  std::vector<Selection> starts;
  for (const Allocation& allocation : additive) starts.push_back(allocation.selection);
  if (auto uniform = widest_uniform(problem)) {
    starts.push_back(*uniform);
    report.uniform = described("uniform", std::move(*uniform));
  }
  const allocate::Relaxation relaxation = relax(loss, problem.candidates);
  report.bound = relaxation.bound;
  report.methods.push_back(described("quadratic", minimise(loss, problem.candidates, relaxation, starts)));
  for (Allocation& allocation : additive) report.methods.push_back(std::move(allocation));
  for (size_t m = 0; m < report.methods.size(); ++m)
    if (report.methods[m].method == method) report.chosen = m;
  return report;
}

void allocate_locally(const config::RunConfig& config, const AllocateRequest& request,
                      const model::ModelConfig& model, const fs::path& statistics,
                      const StatisticsHeader& expected) {
  require_header("allocate", statistics, expected, model.n_blocks);
  AllocationProblem problem = read_problem(config, model, statistics);
  problem.candidates.budget = budget_in_bits(problem, request);
  // Labels drawn from the model have gradients of mean zero; those of the data need not.
  problem.scores.with_linear = request.first_order && config.sensitivity.loss == "nll";
  const QuadraticLoss as_found = estimate_loss(problem.scores.without_prior(), problem.candidates);
  problem.scored["diagonal"] = as_found.diagonal();
  const QuadraticLoss loss = estimate_loss(problem.scores, problem.candidates);
  AllocationReport report = solve(problem, loss, request.method);
  validate(as_found, report);

  const Allocation& chosen = report.methods[report.chosen];
  std::map<std::string, int> bits;
  for (size_t set = 0; set < problem.sets.size(); ++set)
    for (const std::string& module : problem.sets[set].modules)
      bits[module] = static_cast<int>(problem.bits_of(set, chosen.selection[set]));
  std::map<std::string, std::string> provenance{
      {"isobath", kVersion},
      {"model", expected.at("model")},
      {"tokens", expected.at("tokens")},
      {"loss", expected.at("loss")},
      {"method", chosen.method},
      {"budget", request.bytes > 0 ? fmt::format("{} bytes", request.bytes)
                                   : fmt::format("{} bits a weight", request.mean_bits)},
      {"mean_bits", fmt::format("{:.6f}", problem.mean_bits(cost_of(problem.candidates, chosen.selection)))},
      {"predicted_loss_increase", fmt::format("{:.6g} nats per token", chosen.predicted)}};
  const fs::path output = request.output.empty() ? fs::path(config.output) / "bits.yaml" : request.output;
  if (output.has_parent_path()) io::make_directories(output.parent_path());
  io::write_text_atomically(output, config::allocation_text(bits, provenance));
  const fs::path json = request.output.empty() ? fs::path(config.output) / "allocate.json"
                                               : fs::path(output).replace_extension(".json");
  io::write_text_atomically(json, allocation_json(report, provenance));
  log::print(allocation_table(report) +
             fmt::format("in {}; use it with --set quantization.allocation={} --set sensitivity.reuse={}\n",
                         output.string(), output.string(), statistics.string()));
}

}  // namespace

const std::vector<std::string>& allocation_methods() {
  static const std::vector<std::string> kMethods{"quadratic", "diagonal", "weighted", "hawq-v2", "output"};
  return kMethods;
}

void allocate(const config::RunConfig& given, const AllocateRequest& request,
              const comm::Communicator& world) {
  // Any number of ranks will do, whatever grid the configuration measures on.
  config::RunConfig config = given;
  comm::Watchdog::configure(std::chrono::seconds(0));  // the other ranks wait for one that solves
  config.ranks.stages = 1;
  config.ranks.replicas = world.size();
  const Session session = open_session(config, config.calibration.sequences, world);
  const CalibrationSet calibration = open_calibration(session);
  const fs::path statistics = config.sensitivity.reuse.empty() ? fs::path(config.output) / "measure"
                                                               : fs::path(config.sensitivity.reuse);
  world.agree_on([&] {
    if (world.rank() == 0)
      allocate_locally(config, request, session.model(), statistics,
                       identity(statistics_header(session, calibration)));
  });
}

}  // namespace isobath::pipeline
