#include <ATen/ATen.h>

#include <fmt/ranges.h>

#include <isobath/report/table.hpp>
#include <isobath/sensitivity/diagnostics.hpp>
#include <nlohmann/json.hpp>

#include "diagnosis.hpp"

namespace isobath::pipeline {
namespace {

using nlohmann::ordered_json;

/// Linears named at risk, and the k of the precision.
constexpr int64_t kNamed = 10;
// Bounds beyond which a reason is told. In the quadratic zone the curvature ratio is 1; a factor of 2 either
// way leaves room for the fourth-order term of moderate errors.
constexpr double kMostCurvatureRatio = 2, kLeastCurvatureRatio = 0.5;
constexpr double kLeastEffectivePerChannel = 1;
constexpr double kMostCrossTokenMass = 0.5;
constexpr double kMostCoupling = 0.5;
// Standard errors that a coupling must exceed to be told from none.
constexpr double kCouplingErrors = 2;
constexpr double kMostUnderestimation = 2;

/// One linear or block: predictions and measurements in nats per token.
struct Line {
  const DiagnosedPart* part = nullptr;
  double first_order = 0;   ///< of the loss with the data's labels
  double second_order = 0;  ///< ½ E[s²] with drawn labels: predicts KL
  double objective = 0;     ///< ½ Σ D‖ΔWx‖²: what the solver minimises, in nats
  /// Share of Σ_k C_lk that stands off the diagonal; none where that part is within its error.
  std::optional<double> off_diagonal;
  bool others_add =
      false;  ///< the sign of that part: the share has it too, unless the others cancel more than all
  std::optional<double> kl, kl_of_tenth, nll_change;
  std::optional<double> cross_token_mass, effective_per_channel;

  /// R = KL(1) / (100 KL(0.1)); KL has no first-order term.
  [[nodiscard]] std::optional<double> curvature_ratio() const {
    return kl && *kl_of_tenth > 0 ? std::optional(*kl / (100 * *kl_of_tenth)) : std::nullopt;
  }
};

double item(const at::Tensor& tensor) {
  return tensor.item<double>();
}

class Derived {
 public:
  explicit Derived(const Diagnosis& d) : d_(d), n_tokens_(item(d.n_tokens.sum())) {
    const int64_t n_draws = d.fisher.size(0) * d.fisher.size(1);
    const at::Tensor s = d.fisher.reshape({n_draws, -1});
    const at::Tensor diagonal = s.square().sum(0);
    // Draw by draw, what the others bring to Σ_k C_lk.
    const at::Tensor coupling = s * (s.sum(1, true) - s), others = coupling.sum(0);
    const auto n = static_cast<double>(n_draws);
    const at::Tensor error =
        ((coupling.square().sum(0) - others.square() / n) / std::max(1.0, n - 1) * n).clamp_min(0).sqrt();
    // Sums over sequences, means over the draws of each.
    const double draws = static_cast<double>(d.fisher.size(1));
    for (int64_t m = 0; m < s.size(1); ++m) {
      Line& line = modules_.emplace_back();
      line.part = &d.modules[static_cast<size_t>(m)];
      line.first_order = item(d.first_order.select(1, m).sum()) / n_tokens_;
      line.second_order = item(diagonal[m]) / (2 * draws * n_tokens_);
      line.objective = item(d.weighted_change.select(1, m).sum()) / (2 * n_tokens_);
      const double row = item(diagonal[m]) + item(others[m]);
      if (row != 0 && n_draws > 1 && std::abs(item(others[m])) > kCouplingErrors * item(error[m]))
        line.off_diagonal = item(others[m]) / row;
      line.others_add = item(others[m]) > 0;
      line.cross_token_mass = d.cross_token_mass[static_cast<size_t>(m)];
      line.effective_per_channel = d.effective_per_channel[static_cast<size_t>(m)];
    }
    const double total = item(s.sum(1).square().sum());
    off_diagonal_ = total > 0 ? 1 - item(diagonal.sum()) / total : 0;
    all_second_order_ = total / (2 * draws * n_tokens_);
    for (size_t i = 0; i < d.measured.size(); ++i)
      if (d.module_of[i] >= 0)
        add_measured(modules_[static_cast<size_t>(d.module_of[i])], i);
      else
        add_block(i);
  }

  [[nodiscard]] std::vector<const Line*> measured() const {
    std::vector<const Line*> lines;
    for (const Line& line : modules_)
      if (line.kl) lines.push_back(&line);
    return lines;
  }

  const Diagnosis& d_;
  double n_tokens_, off_diagonal_ = 0, all_second_order_ = 0;
  std::vector<Line> modules_, blocks_;

 private:
  void add_measured(Line& line, size_t place) const {
    const at::Tensor sums = d_.changes.select(1, static_cast<int64_t>(place)).sum(0) / n_tokens_;
    line.kl = item(sums[kKl]);
    line.kl_of_tenth = item(sums[kKlOfTenth]);
    line.nll_change = item(sums[kNllChange]);
  }
  // Its linears move together: (Σ s)².
  void add_block(size_t place) {
    Line& line = blocks_.emplace_back();
    line.part = &d_.measured[place];
    at::Tensor s = at::zeros({d_.fisher.size(0), d_.fisher.size(1)}, at::kDouble);
    for (size_t m = 0; m < modules_.size(); ++m) {
      if (modules_[m].part->block != line.part->block) continue;
      s += d_.fisher.select(2, static_cast<int64_t>(m));
      line.first_order += modules_[m].first_order;
      line.objective += modules_[m].objective;
    }
    line.second_order = item(s.square().sum()) / (2 * static_cast<double>(s.size(1)) * n_tokens_);
    add_measured(line, place);
  }
};

std::vector<double> values_of(const std::vector<const Line*>& lines, double (*value)(const Line&)) {
  std::vector<double> values;
  for (const Line* line : lines) values.push_back(value(*line));
  return values;
}
double kl_of(const Line& line) {
  return *line.kl;
}
double second_order_of(const Line& line) {
  return line.second_order;
}
double objective_of(const Line& line) {
  return line.objective;
}

/// How well predictions order what was measured.
ordered_json agreement(const std::vector<const Line*>& lines) {
  const std::vector<double> kl = values_of(lines, kl_of), scores = values_of(lines, second_order_of),
                            objectives = values_of(lines, objective_of);
  double predicted = 0, measured = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    predicted += scores[i];
    measured += kl[i];
  }
  ordered_json result = {{"parts", lines.size()},
                         {"rank_correlation_second_order", sensitivity::rank_correlation(scores, kl)},
                         {"rank_correlation_objective", sensitivity::rank_correlation(objectives, kl)},
                         {"precision_at_10_second_order", sensitivity::precision_at(scores, kl, kNamed)},
                         {"precision_at_10_objective", sensitivity::precision_at(objectives, kl, kNamed)}};
  result["predicted_over_measured"] = measured > 0 ? ordered_json(predicted / measured) : ordered_json();
  return result;
}

std::vector<std::string> reasons_of(const Line& line, double total) {
  std::vector<std::string> reasons;
  if (total > 0)
    reasons.push_back(fmt::format("{:.1f} % of the solver's objective", 100 * line.objective / total));
  if (const auto ratio = line.curvature_ratio();
      ratio && (*ratio > kMostCurvatureRatio || *ratio < kLeastCurvatureRatio))
    reasons.push_back(fmt::format("outside the quadratic zone (curvature ratio {:.2f})", *ratio));
  if (line.effective_per_channel && *line.effective_per_channel < kLeastEffectivePerChannel)
    reasons.push_back(fmt::format("few tokens decide its H (n_eff/d {:.2f}): more damping or tokens",
                                  *line.effective_per_channel));
  if (line.cross_token_mass && *line.cross_token_mass > kMostCrossTokenMass)
    reasons.push_back(fmt::format("tokens act together (cross-token mass {:.2f}), which D does not see",
                                  *line.cross_token_mass));
  if (line.off_diagonal && std::abs(*line.off_diagonal) > kMostCoupling)
    reasons.push_back(fmt::format("errors of other linears {} it (off-diagonal share {:.2f})",
                                  line.others_add ? "add to" : "cancel", *line.off_diagonal));
  if (line.kl && line.objective > 0 && *line.kl > kMostUnderestimation * line.objective)
    reasons.push_back(fmt::format("measured {:.1f} times the prediction", *line.kl / line.objective));
  return reasons;
}

ordered_json to_json(const Line& line) {
  const auto maybe = [](const std::optional<double>& value) {
    return value ? ordered_json(*value) : ordered_json();
  };
  return {{"name", line.part->name},
          {"block", line.part->block},
          {"predicted_first_order", line.first_order},
          {"predicted_second_order", line.second_order},
          {"predicted_objective", line.objective},
          {"kl", maybe(line.kl)},
          {"nll_change", maybe(line.nll_change)},
          {"curvature_ratio", maybe(line.curvature_ratio())},
          {"effective_samples_per_channel", maybe(line.effective_per_channel)},
          {"cross_token_mass", maybe(line.cross_token_mass)},
          {"off_diagonal_share", maybe(line.off_diagonal)}};
}

std::string number(const std::optional<double>& value, const char* format = "{:.3e}") {
  return value ? fmt::format(fmt::runtime(format), *value) : "-";
}

void add_row(report::Table& table, const Line& line) {
  table.add({line.part->name, number(line.kl), number(line.second_order), number(line.objective),
             number(line.nll_change, "{:+.2e}"), number(line.first_order, "{:+.2e}"),
             number(line.curvature_ratio(), "{:.2f}"), number(line.effective_per_channel, "{:.1f}"),
             number(line.cross_token_mass, "{:.2f}"), number(line.off_diagonal, "{:.2f}")});
}

std::string agreement_text(const char* what, const ordered_json& found) {
  return fmt::format(
      "{} {} measured: rank correlation with KL {:.3f} (s), {:.3f} (D); precision at 10 {:.2f} (s), {:.2f} "
      "(D); "
      "sum of predictions / measured {}\n",
      found["parts"].get<size_t>(), what, found["rank_correlation_second_order"].get<double>(),
      found["rank_correlation_objective"].get<double>(), found["precision_at_10_second_order"].get<double>(),
      found["precision_at_10_objective"].get<double>(),
      found["predicted_over_measured"].is_null()
          ? "-"
          : fmt::format("{:.2f}", found["predicted_over_measured"].get<double>()));
}

}  // namespace

DiagnosisReport report_of(const Diagnosis& diagnosis, const DiagnoseRequest& request) {
  const Derived derived(diagnosis);
  ordered_json json = {{"tokens", derived.n_tokens_},
                       {"sequences", diagnosis.n_tokens.size(0)},
                       {"samples", diagnosis.fisher.size(1)},
                       {"off_diagonal_share", derived.off_diagonal_},
                       {"predicted_second_order_of_all", derived.all_second_order_}};
  std::string text;

  report::Table table({"worst", "KL", "½E[s²]", "½ΣD|ΔWx|²", "Δ loss", "E[s]", "R", "n_eff/d", "cross-token",
                       "off-diagonal"});
  const std::vector<const Line*> measured = derived.measured();
  // Without measurements of linears the predictions tell the worst.
  std::vector<double> sizes;
  for (const Line& line : derived.modules_)
    sizes.push_back(line.kl.value_or(measured.empty() ? line.second_order : -1));
  const auto n_rows = measured.empty() ? request.rows : std::min(request.rows, std::ssize(measured));
  for (const int64_t place : sensitivity::largest(sizes, n_rows))
    add_row(table, derived.modules_[static_cast<size_t>(place)]);
  for (const Line& line : derived.blocks_) add_row(table, line);
  text +=
      table.text() +
      "Nats per token; each part replaced alone. KL: to the original. ½E[s²]: predicted by "
      "s = ⟨G, XΔWᵀ⟩ with labels of the model; ½ΣD|ΔWx|²: by the solver's objective; Δ loss: labels of the "
      "data, predicted E[s] to first order. R = KL(ΔW)/(100 KL(ΔW/10)): 1 in the quadratic zone.\n";
  if (!measured.empty()) {
    json["agreement"] = agreement(measured);
    text += agreement_text("linears", json["agreement"]);
  }
  std::vector<const Line*> blocks;
  for (const Line& line : derived.blocks_) blocks.push_back(&line);
  json["agreement_of_blocks"] = agreement(blocks);
  text += agreement_text("blocks", json["agreement_of_blocks"]);
  text += fmt::format("all linears together: ½E[s²] {:.3e}, off-diagonal share {:.2f}\n",
                      derived.all_second_order_, derived.off_diagonal_);

  // Named by the prediction alone, so that the precision above tells what the names are worth; by that of D,
  // a mean over tokens, as E[s²] of a few draws is noise of its own size.
  std::vector<double> predicted;
  double total = 0;
  for (const Line& line : derived.modules_) {
    predicted.push_back(line.objective);
    total += line.objective;
  }
  json["at_risk"] = ordered_json::array();
  text += "at risk:\n";
  for (const int64_t place : sensitivity::largest(predicted, kNamed)) {
    const Line& line = derived.modules_[static_cast<size_t>(place)];
    const std::vector<std::string> reasons = reasons_of(line, total);
    json["at_risk"].push_back({{"name", line.part->name}, {"reasons", reasons}});
    text += fmt::format("  {}: {}\n", line.part->name, fmt::join(reasons, "; "));
  }
  json["modules"] = ordered_json::array();
  for (const Line& line : derived.modules_) json["modules"].push_back(to_json(line));
  json["blocks"] = ordered_json::array();
  for (const Line& line : derived.blocks_) json["blocks"].push_back(to_json(line));
  return {.table = text, .json = json.dump(1) + "\n"};
}

}  // namespace isobath::pipeline
