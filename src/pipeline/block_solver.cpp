#include <isobath/pipeline/block_solver.hpp>

#include <ATen/ATen.h>

#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/quant/correction.hpp>
#include <limits>

#include "row_tiles.hpp"
#include "solver_units.hpp"

namespace isobath::pipeline {

namespace {

// All zero, so that ranks can fill in their rows and share them.
quant::QuantizedMatrix zero_matrix(int64_t n_rows, int64_t n_columns, const quant::GridSpec& grid) {
  const int64_t n_groups = quant::n_groups(n_columns, grid);
  return {.spec = grid,
          .codes = at::zeros({n_rows, n_columns}, at::kChar),
          .scale = at::zeros({n_rows, n_groups}, grid.storage),
          .zero = at::zeros({n_rows, n_groups}, at::kChar)};
}

// Rows in the order of their groups to their places in the linear.
void return_rows(quant::QuantizedMatrix& matrix, const at::Tensor& order) {
  const at::Tensor places = order.argsort();
  for (at::Tensor* part : {&matrix.codes, &matrix.scale, &matrix.zero}) *part = part->index_select(0, places);
}

}  // namespace

BlockSolver::BlockSolver(const Session& session, const CalibrationSet& calibration)
    : session_(session), calibration_(calibration) {
  const config::Quantization& quantization = session.config.quantization;
  factor_spec_ = {.damping = quantization.damping,
                  .act_order = quantization.act_order == "static" ? quant::ActOrder::static_groups
                                                                  : quant::ActOrder::none};
}

void BlockSolver::factorize_whole(const std::vector<SolverUnit*>& units, int64_t n_channels,
                                  const ForEachInput& for_each_input) const {
  accumulate(session_, calibration_, units, n_channels, for_each_input);
  // H is positive semidefinite whatever D is; the trailing rank of few effective samples is what damping is
  // for. All roots factorize at once, then each sends what all need; the panels follow when rows are solved.
  const comm::Communicator& world = session_.world();
  const config::Asymmetric& asymmetric = session_.config.quantization.asymmetric;
  for (SolverUnit* unit : units) {
    if (world.rank() != unit->root) continue;
    const trace::Span span("factorize");
    unit->factor = quant::factorize(unit->h, factor_spec_);
    if (!unit->factor.failed && asymmetric.is_on()) {
      if (asymmetric.correction == "qep") {
        unit->ridge_factor = quant::factorize(unit->h, quant::ridge_spec(asymmetric.ridge));
        quant::check_ridge(unit->ridge_factor);
      } else {
        unit->correction = quant::gptaq_correction(unit->c, unit->factor);
      }
      for (const Range& columns : unit->layout.columns)
        unit->c_panels.push_back(unit->c.slice(1, columns.begin, columns.end).contiguous());
    }
    unit->h.reset();
    unit->c.reset();
  }
}

void BlockSolver::share(SolverUnit& unit, int64_t n_channels) const {
  const trace::Span span("facts of the factor to all ranks");
  const comm::Communicator& world = session_.world();
  quant::Factor& factor = unit.factor;
  std::array<double, 4> facts{factor.damping, factor.mean, static_cast<double>(factor.n_fallbacks),
                              factor.failed ? 1.0 : 0.0};
  world.broadcast(std::span<double>(facts), unit.root);
  const bool is_root = world.rank() == unit.root;
  if (!is_root) {
    factor = quant::factor_of_diagonal(at::zeros({n_channels}, at::kDouble), factor_spec_);
    factor.damping = facts[0];
    factor.mean = facts[1];
    factor.n_fallbacks = static_cast<int64_t>(facts[2]);
    factor.failed = facts[3] != 0;
  }
  const auto send = [&](at::Tensor& tensor) {
    if (!is_root && !tensor.defined()) tensor = at::empty({n_channels, n_channels}, at::kFloat);
    world.broadcast(tensor, unit.root);
  };
  send(factor.order);
  send(factor.dead);
  send(factor.curvature);
  const config::Asymmetric& asymmetric = session_.config.quantization.asymmetric;
  if (factor.failed || !asymmetric.is_on()) return;
  unit.c_panels.resize(unit.layout.columns.size());
  if (asymmetric.correction != "qep") return send(unit.correction);
  if (!is_root)
    unit.ridge_factor =
        quant::factor_of_diagonal(at::zeros({n_channels}, at::kDouble), quant::ridge_spec(asymmetric.ridge));
  send(unit.ridge_factor.curvature);
}

void BlockSolver::factorize(const std::vector<SolverUnit*>& units, int64_t n_channels,
                            const ForEachInput& for_each_input) const {
  if (!units.front()->layout.is_spread) return factorize_whole(units, n_channels, for_each_input);
  for (SolverUnit* unit : units)
    factorize_spread(session_, calibration_, *unit, factor_spec_, for_each_input);
}

void BlockSolver::share(const std::vector<SolverUnit*>& units, int64_t n_channels) const {
  if (units.front()->layout.is_spread) return;
  for (SolverUnit* unit : units) share(*unit, n_channels);
}

std::vector<Solved> BlockSolver::solve(int64_t block, const std::vector<SolveTask>& tasks,
                                       const model::BlockWeights& weights,
                                       const ForEachInput& for_each_input) const {
  const Timer timer;
  const int64_t n_channels = weights[tasks.front().projection].weight.size(1);
  std::optional<trace::Span> span(std::in_place, "token weights");
  std::vector<SolverUnit> units = make_units(session_, tasks, weights, block);
  shrink_weights(session_, calibration_, units, n_channels, for_each_input);
  span.reset();

  std::vector<Solved> solved(tasks.size());
  for (size_t t = 0; t < tasks.size(); ++t) {
    const at::Tensor& weight = weights[tasks[t].projection].weight;
    solved[t].matrix = zero_matrix(weight.size(0), weight.size(1), tasks[t].grid);
    ModuleRecord& record = solved[t].record;
    record.module = model::module_name(block, tasks[t].projection);
    record.bits = tasks[t].grid.bits;
    record.group = tasks[t].grid.group;
    record.bits_per_weight = quant::bits_per_weight(weight.size(1), tasks[t].grid);
    record.effective_samples_per_channel = std::numeric_limits<double>::infinity();
  }
  // Units that are spread keep all ranks busy one at a time, and only one has to be in memory; the others are
  // factorized together, each on its own root.
  const size_t n_together = units.front().layout.is_spread ? 1 : units.size();
  for (size_t first = 0; first < units.size(); first += n_together) {
    std::vector<SolverUnit*> together;
    for (size_t u = first; u < first + n_together; ++u) together.push_back(&units[u]);
    SetRows rows(session_, together, tasks, weights, solved);
    factorize(together, n_channels, for_each_input);
    rows.round();
    share(together, n_channels);
    // A weighted H that no damping saved is replaced by the plain one; where that fails too, the rows are
    // rounded.
    std::vector<SolverUnit*> failed;
    for (SolverUnit* unit : together)
      if (unit->factor.failed && unit->is_weighted) failed.push_back(unit);
    for (SolverUnit* unit : failed) {
      unit->n_fallbacks += unit->factor.n_fallbacks + 1;
      unit->is_weighted = false;
      unit->token_weights.reset();
    }
    if (!failed.empty()) {
      factorize(failed, n_channels, for_each_input);
      share(failed, n_channels);
    }
    rows.solve(solved);
    for (SolverUnit* unit : together) {
      describe(*unit, n_channels, solved);
      unit->factor = unit->ridge_factor = {};
      unit->correction.reset();
      unit->c_panels.clear();
    }
  }
  for (size_t t = 0; t < tasks.size(); ++t)
    if (tasks[t].row_groups.order.defined()) return_rows(solved[t].matrix, tasks[t].row_groups.order);
  for (Solved& one : solved) {
    ModuleRecord& record = one.record;
    record.wall_s = timer.seconds();
    if (record.n_fallbacks > 0)
      log::warning("{}: {} fallbacks; damping {:g}, weighting {}", record.module, record.n_fallbacks,
                   record.damping, record.weighting);
  }
  return solved;
}

void BlockSolver::describe(const SolverUnit& unit, int64_t n_channels, std::vector<Solved>& solved) const {
  const double n_effective = unit.is_weighted
                                 ? unit.n_effective
                                 : static_cast<double>(calibration_.tokens.lengths.sum().item<int64_t>());
  for (const SolverUnit::Rows& served : unit.serves) {
    ModuleRecord& record = solved[served.task].record;
    record.damping = std::max(record.damping, unit.factor.damping);
    if (unit.is_weighted) record.shrinkage = std::max(record.shrinkage, unit.shrinkage);
    record.n_fallbacks += unit.n_fallbacks + unit.factor.n_fallbacks + (unit.factor.failed ? 1 : 0);
    record.weighting = unit.factor.failed ? "round_to_nearest" : unit.is_weighted ? "sensitivity" : "none";
    record.effective_samples_per_channel =
        std::min(record.effective_samples_per_channel, n_effective / static_cast<double>(n_channels));
  }
}

std::vector<Solved> round_set(int64_t block, const std::vector<SolveTask>& tasks,
                              const model::BlockWeights& weights) {
  std::vector<Solved> solved;
  for (const SolveTask& task : tasks) {
    const at::Tensor w = weights[task.projection].weight.to(at::kCPU, at::kFloat).contiguous();
    Solved one{.matrix = quant::round_to_nearest(w, {}, task.grid), .record = {}};
    one.record.module = model::module_name(block, task.projection);
    one.record.bits = task.grid.bits;
    one.record.group = task.grid.group;
    one.record.weighting = "round_to_nearest";
    // H is the identity.
    one.record.objective =
        0.5 * (quant::dequantize(one.matrix).to(at::kFloat) - w).square().sum(at::kDouble).item<double>();
    one.record.objective_rounded = one.record.objective;
    one.record.bits_per_weight = quant::bits_per_weight(w.size(1), task.grid);
    solved.push_back(std::move(one));
  }
  return solved;
}

}  // namespace isobath::pipeline
