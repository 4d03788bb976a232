#include <ATen/ATen.h>

#include <fmt/ranges.h>

#include <cmath>
#include <isobath/report/table.hpp>
#include <nlohmann/json.hpp>
#include <set>

#include "allocation_problem.hpp"

namespace isobath::pipeline {
namespace {

std::string method_table(const AllocationReport& report) {
  report::Table table(
      {"method", "bits a weight", "predicted loss", "additive part", "held out", "to uniform"});
  const auto add = [&](const std::string& name, const Allocation& allocation) {
    const double mean = report.problem.mean_bits(cost_of(report.problem.candidates, allocation.selection));
    const bool comparable = report.uniform && allocation.held_out && *report.uniform->held_out > 0;
    table.add({name, fmt::format("{:.4f}", mean), fmt::format("{:.5f}", allocation.predicted),
               fmt::format("{:.5f}", allocation.additive),
               allocation.held_out ? fmt::format("{:.5f}", *allocation.held_out) : "-",
               comparable ? fmt::format("{:.3f}", *allocation.held_out / *report.uniform->held_out) : "-"});
  };
  for (size_t m = 0; m < report.methods.size(); ++m)
    add(report.methods[m].method + (m == report.chosen ? " (chosen)" : ""), report.methods[m]);
  if (report.uniform) {
    std::set<int64_t> widths;
    for (size_t set = 0; set < report.problem.sets.size(); ++set)
      if (report.problem.sets[set].bits.size() > 1)
        widths.insert(report.problem.bits_of(set, report.uniform->selection[set]));
    add(widths.empty() ? "uniform" : fmt::format("uniform, {} bits", *widths.begin()), *report.uniform);
  }
  table.add({"lower bound", "", fmt::format("{:.5f}", report.bound), "", "", ""});
  return table.text();
}

std::string width_table(const AllocationReport& report) {
  std::vector<std::string> header{"width", "linears", "share of weights"};
  for (int set = 0; set < model::kInputSets; ++set) header.emplace_back(model::name_of_input_set(set));
  report::Table table(header);
  struct Row {
    int64_t n_modules = 0, n_weights = 0;
    std::array<int64_t, model::kInputSets> blocks{};
  };
  std::map<int64_t, Row> rows;
  const AllocationProblem& problem = report.problem;
  for (size_t s = 0; s < problem.sets.size(); ++s) {
    const FusedSet& set = problem.sets[s];
    Row& row = rows[problem.bits_of(s, report.methods[report.chosen].selection[s])];
    row.n_modules += std::ssize(set.modules);
    row.n_weights += set.n_weights;
    ++row.blocks[static_cast<size_t>(set.input_set)];
  }
  for (const auto& [bits, row] : rows) {
    std::vector<std::string> cells{fmt::format("{} bits", bits), std::to_string(row.n_modules),
                                   fmt::format("{:.1f} %", 100.0 * static_cast<double>(row.n_weights) /
                                                               static_cast<double>(problem.n_weights))};
    for (const int64_t blocks : row.blocks) cells.push_back(std::to_string(blocks));
    table.add(std::move(cells));
  }
  return table.text();
}

std::string share_text(const std::map<int64_t, double>& prior_share) {
  if (prior_share.empty()) return "";
  std::vector<std::string> parts;
  for (const auto& [bits, share] : prior_share)
    parts.push_back(fmt::format("{:.0f} % at {} bits", 100 * share, bits));
  return fmt::format("Squares are shrunk towards the weighted score: {}.\n", fmt::join(parts, ", "));
}

nlohmann::ordered_json to_json(const AllocationReport& report, const Allocation& allocation) {
  nlohmann::ordered_json held_out;
  if (allocation.held_out) held_out = *allocation.held_out;
  return {{"method", allocation.method},
          {"mean_bits", report.problem.mean_bits(cost_of(report.problem.candidates, allocation.selection))},
          {"predicted_loss_increase", allocation.predicted},
          {"additive_part", allocation.additive},
          {"held_out_loss_increase", held_out}};
}

}  // namespace

std::string allocation_table(const AllocationReport& report) {
  const AllocationProblem& problem = report.problem;
  const Allocation& chosen = report.methods[report.chosen];
  const auto diagonal = std::ranges::find(report.methods, "diagonal", &Allocation::method);
  std::string text = method_table(report);
  const allocate::Coupling& coupling = report.loss.coupling;
  text += fmt::format(
      "Predicted loss: increase in nats per token, {}½ xᵀCx/T, C = E[s sᵀ] of {} sequences{}.\n"
      "Correlation of two sets d blocks apart: {:.2f} x {:.2f}^d of the one found, {:.2f} of the mean of "
      "such "
      "sets in a block,\nand {:.3f} x {:.2f}^d as all have. {}"
      "Additive part: without the pairs of different sets. Held out: chosen on three quarters of the "
      "sequences, judged on the fourth,\nsquares as found; to uniform: of these. No selection within the "
      "budget is predicted below the bound.\n\n",
      problem.scores.with_linear ? "E[s]·x/T + " : "", problem.scores.n_sequences(),
      problem.scores.samples > 1 ? fmt::format(" and {} label draws", problem.scores.samples) : "",
      1 - coupling.shrinkage, coupling.decay, coupling.shrinkage * (1 - coupling.common),
      coupling.shrinkage * coupling.common, coupling.common_decay, share_text(report.loss.prior_share));
  text += width_table(report);
  text +=
      fmt::format("Numbers under q/k/v, o, gate/up, down are blocks.\npredicted loss {:+.5f} nats per token",
                  chosen.predicted);
  if (diagonal != report.methods.end() && std::abs(diagonal->predicted) > 0)
    text += fmt::format(", {:.3f} of the additive choice's", chosen.predicted / diagonal->predicted);
  if (std::abs(report.bound) > 0)
    text += fmt::format(", {:.1f} % above the bound",
                        100 * (chosen.predicted - report.bound) / std::abs(report.bound));
  return text + "\n";
}

std::string allocation_json(const AllocationReport& report,
                            const std::map<std::string, std::string>& provenance) {
  const AllocationProblem& problem = report.problem;
  nlohmann::ordered_json result;
  for (const auto& [name, value] : provenance) result[name] = value;
  result["units"] = "losses in nats per token; mean_bits in stored bits a weight, scales included";
  result["budget_bits"] = problem.candidates.budget;
  result["n_weights"] = problem.n_weights;
  result["n_sequences"] = problem.scores.n_sequences();
  result["n_samples"] = problem.scores.samples;
  const allocate::Coupling& coupling = report.loss.coupling;
  result["coupling"] = {{"shrinkage", coupling.shrinkage},
                        {"decay_per_block", coupling.decay},
                        {"common", coupling.common},
                        {"common_decay_per_block", coupling.common_decay}};
  result["share_of_weighted"] = nlohmann::ordered_json::object();
  for (const auto& [bits, share] : report.loss.prior_share)
    result["share_of_weighted"][std::to_string(bits)] = share;
  result["first_order_term"] = problem.scores.with_linear;
  result["lower_bound"] = report.bound;
  result["methods"] = nlohmann::ordered_json::array();
  for (const Allocation& allocation : report.methods)
    result["methods"].push_back(to_json(report, allocation));
  if (report.uniform) result["uniform"] = to_json(report, *report.uniform);
  result["sets"] = nlohmann::ordered_json::array();
  const std::vector<double> alone = report.loss.diagonal();
  for (size_t s = 0; s < problem.sets.size(); ++s) {
    const FusedSet& set = problem.sets[s];
    nlohmann::ordered_json chosen = nlohmann::ordered_json::object(),
                           candidates = nlohmann::ordered_json::array();
    for (const Allocation& allocation : report.methods)
      chosen[allocation.method] = problem.bits_of(s, allocation.selection[s]);
    for (int64_t k = problem.candidates.first[s]; k < problem.candidates.first[s + 1]; ++k) {
      nlohmann::ordered_json candidate{{"bits", problem.bits_of(s, k)},
                                       {"stored_bits", problem.candidates.cost[static_cast<size_t>(k)]},
                                       {"additive_part", alone[static_cast<size_t>(k)]},
                                       {"first_order", report.loss.linear[k].item<double>()}};
      for (const auto& [method, scores] : problem.scored) candidate[method] = scores[static_cast<size_t>(k)];
      candidates.push_back(std::move(candidate));
    }
    result["sets"].push_back({{"block", set.block},
                              {"set", model::name_of_input_set(set.input_set)},
                              {"modules", set.modules},
                              {"n_weights", set.n_weights},
                              {"bits", chosen},
                              {"candidates", candidates}});
  }
  return result.dump(1) + "\n";
}

}  // namespace isobath::pipeline
