#include <isobath/pipeline/block_solver.hpp>

#include <ATen/ATen.h>

#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/quant/correction.hpp>
#include <isobath/quant/refine.hpp>
#include <limits>

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

// Copies `part` over the rows of `whole` from `begin`.
void put_rows(quant::QuantizedMatrix& whole, int64_t begin, const quant::QuantizedMatrix& part) {
  const int64_t end = begin + part.codes.size(0);
  whole.codes.slice(0, begin, end).copy_(part.codes);
  whole.scale.slice(0, begin, end).copy_(part.scale);
  whole.zero.slice(0, begin, end).copy_(part.zero);
}

}  // namespace

BlockSolver::BlockSolver(const Session& session, const CalibrationSet& calibration)
    : session_(session), calibration_(calibration), n_sweeps_(session.config.quantization.refinement.sweeps) {
  const config::Quantization& quantization = session.config.quantization;
  factor_spec_ = {.damping = quantization.damping,
                  .act_order = quantization.act_order == "static" ? quant::ActOrder::static_groups
                                                                  : quant::ActOrder::none};
}

void BlockSolver::factorize(std::vector<SolverUnit>& units) const {
  // H is positive semidefinite whatever D is; the trailing rank of few effective samples is what damping is
  // for. All roots factorize at once, then each sends.
  const comm::Communicator& world = session_.world();
  const config::Asymmetric& asymmetric = session_.config.quantization.asymmetric;
  for (SolverUnit& unit : units) {
    if (world.rank() != unit.root) continue;
    const trace::Span span("factorize");
    unit.factor = quant::factorize(unit.h, factor_spec_);
    if (unit.factor.failed || !asymmetric.is_on()) continue;
    unit.correction = asymmetric.correction == "qep" ? quant::qep_correction(unit.c, unit.h, asymmetric.ridge)
                                                     : quant::gptaq_correction(unit.c, unit.factor);
  }
  for (SolverUnit& unit : units) share(unit);
}

void BlockSolver::share(SolverUnit& unit) const {
  const trace::Span span("factor to all ranks");
  const comm::Communicator& world = session_.world();
  const bool is_root = world.rank() == unit.root;
  std::array<int64_t, 3> counts{};
  std::array<double, 1> damping{};
  if (is_root) {
    counts = {unit.h.size(0), unit.factor.n_fallbacks, unit.factor.failed ? 1 : 0};
    damping = {unit.factor.damping};
  }
  world.broadcast(std::span<int64_t>(counts), unit.root);
  world.broadcast(std::span<double>(damping), unit.root);
  const int64_t d = counts[0];
  unit.n_fallbacks += counts[1];
  std::vector<at::Tensor*> parts{&unit.h};
  if (!is_root) {
    unit.factor.n_fallbacks = counts[1];
    unit.factor.failed = counts[2] != 0;
    unit.factor.damping = damping[0];
    unit.h = at::empty({d, d}, at::kFloat);
  }
  const bool is_asymmetric = session_.config.quantization.asymmetric.is_on();
  if (is_asymmetric) {
    if (!is_root) unit.c = at::empty({d, d}, at::kFloat);
    parts.push_back(&unit.c);
  }
  if (!unit.factor.failed) {
    if (!is_root) {
      unit.factor.upper = at::empty({d, d}, at::kFloat);
      unit.factor.order = at::empty({d}, at::kLong);
      unit.factor.dead = at::empty({d}, at::kBool);
      unit.factor.importance = at::empty({d}, at::kFloat);
      if (is_asymmetric) unit.correction = at::empty({d, d}, at::kFloat);
    }
    for (at::Tensor* part :
         {&unit.factor.upper, &unit.factor.order, &unit.factor.dead, &unit.factor.importance})
      parts.push_back(part);
    if (is_asymmetric) parts.push_back(&unit.correction);
  }
  for (at::Tensor* part : parts) {
    *part = part->contiguous();
    world.broadcast(*part, unit.root);
  }
  if (n_sweeps_ > 0 && !unit.factor.failed)
    unit.damped_h = quant::damped_hessian(unit.h, unit.factor.damping);
}

void BlockSolver::solve_rows(const SolverUnit& unit, const SolveTask& task, const at::Tensor& weight,
                             quant::QuantizedMatrix& matrix, ModuleRecord& record) const {
  const comm::Communicator& world = session_.world();
  const int64_t n_rows = weight.size(0);
  const int64_t n_tiles = (n_rows + quant::kRowTile - 1) / quant::kRowTile;
  const Range tiles = partition(n_tiles, world.size(), world.rank());
  at::Tensor objectives = at::zeros({n_tiles, 3}, at::kDouble);  // rounded, chosen, asymmetric
  std::optional<trace::Span> span(std::in_place, "solve rows");
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t begin = tile * quant::kRowTile, end = std::min(n_rows, begin + quant::kRowTile);
    const at::Tensor original = weight.slice(0, begin, end).to(at::kCPU, at::kFloat).contiguous();
    const at::Tensor w =
        unit.correction.defined()
            ? quant::corrected(original, unit.correction, session_.config.quantization.asymmetric.strength)
            : original;
    const quant::QuantizedMatrix rounded = quant::round_to_nearest(original, {}, task.grid);
    quant::QuantizedMatrix part = unit.factor.failed ? rounded : quant::gptq(w, unit.factor, task.grid);
    if (unit.damped_h.defined()) part = quant::refine(part, w, unit.damped_h, n_sweeps_);
    put_rows(matrix, begin, part);
    const at::Tensor chosen = quant::dequantize(part);
    objectives[tile][0] = quant::objective(original, quant::dequantize(rounded), unit.h);
    objectives[tile][1] = quant::objective(original, chosen, unit.h);
    if (unit.c.defined()) objectives[tile][2] = quant::asymmetric_objective(original, chosen, unit.h, unit.c);
  }
  span.emplace("codes to all ranks");
  for (at::Tensor* part : {&matrix.codes, &matrix.scale, &matrix.zero, &objectives})
    share_disjoint(*part, world);
  // In the order of the tiles, whoever had them.
  double asymmetric = 0;
  for (int64_t tile = 0; tile < n_tiles; ++tile) {
    record.objective_rounded += objectives[tile][0].item<double>();
    record.objective += objectives[tile][1].item<double>();
    asymmetric += objectives[tile][2].item<double>();
  }
  if (unit.c.defined()) record.objective_asymmetric = record.objective_asymmetric.value_or(0) + asymmetric;
}

std::vector<Solved> BlockSolver::solve(int64_t block, const std::vector<SolveTask>& tasks,
                                       const model::BlockWeights& weights,
                                       const ForEachInput& for_each_input) const {
  const Timer timer;
  std::vector<SolverUnit> units = make_units(session_, tasks, weights, block);
  const int64_t n_channels = weights[tasks.front().projection].weight.size(1);
  shrink_weights(session_, calibration_, units, n_channels, for_each_input);
  accumulate(session_, calibration_, units, n_channels, for_each_input);
  factorize(units);

  // A weighted H that no damping saved is replaced by the plain one; where that fails too, the rows are
  // rounded.
  std::vector<SolverUnit*> failed;
  for (SolverUnit& unit : units)
    if (unit.factor.failed && unit.is_weighted) failed.push_back(&unit);
  if (!failed.empty()) {
    std::vector<SolverUnit> plain(1);
    accumulate(session_, calibration_, plain, n_channels, for_each_input);
    factorize(plain);
    for (SolverUnit* unit : failed) {
      unit->h = plain[0].h;
      unit->c = plain[0].c;
      unit->correction = plain[0].correction;
      unit->factor = plain[0].factor;
      unit->damped_h = plain[0].damped_h;
      unit->root = plain[0].root;
      unit->is_weighted = false;
      unit->n_fallbacks += 1 + plain[0].n_fallbacks;
    }
  }

  std::vector<Solved> solved(tasks.size());
  for (size_t t = 0; t < tasks.size(); ++t) {
    const at::Tensor& weight = weights[tasks[t].projection].weight;
    Solved& result = solved[t];
    result.matrix = zero_matrix(weight.size(0), weight.size(1), tasks[t].grid);
    ModuleRecord& record = result.record;
    record.module = model::module_name(block, tasks[t].projection);
    record.bits = tasks[t].grid.bits;
    record.group = tasks[t].grid.group;
    record.bits_per_weight = quant::bits_per_weight(weight.size(1), tasks[t].grid);
    record.effective_samples_per_channel = std::numeric_limits<double>::infinity();
    for (const SolverUnit& unit : units) {
      for (const SolverUnit::Rows& served : unit.serves) {
        if (served.task != t) continue;
        const at::Tensor rows = weight.slice(0, served.rows.begin, served.rows.end);
        quant::QuantizedMatrix part = zero_matrix(rows.size(0), rows.size(1), tasks[t].grid);
        solve_rows(unit, tasks[t], rows, part, record);
        put_rows(result.matrix, served.rows.begin, part);
        record.damping = std::max(record.damping, unit.factor.damping);
        if (unit.is_weighted) record.shrinkage = std::max(record.shrinkage, unit.shrinkage);
        record.n_fallbacks += unit.n_fallbacks + (unit.factor.failed ? 1 : 0);
        record.weighting = unit.factor.failed ? "round_to_nearest"
                           : unit.is_weighted ? "sensitivity"
                                              : "none";
        const double n_effective =
            unit.token_weights.defined() && unit.is_weighted
                ? unit.n_effective
                : static_cast<double>(calibration_.tokens.lengths.sum().item<int64_t>());
        record.effective_samples_per_channel =
            std::min(record.effective_samples_per_channel, n_effective / static_cast<double>(weight.size(1)));
      }
    }
    record.wall_s = timer.seconds();
    if (record.n_fallbacks > 0)
      log::warning("{}: {} fallbacks; damping {:g}, weighting {}", record.module, record.n_fallbacks,
                   record.damping, record.weighting);
  }
  return solved;
}

std::vector<Solved> round_set(int64_t block, const std::vector<SolveTask>& tasks,
                              const model::BlockWeights& weights) {
  std::vector<Solved> solved;
  for (const SolveTask& task : tasks) {
    const at::Tensor w = weights[task.projection].weight.to(at::kCPU, at::kFloat).contiguous();
    Solved one{.matrix = quant::round_to_nearest(w, {}, task.grid), .record = {}};
    const at::Tensor identity = at::eye(w.size(1), at::kFloat);
    one.record.module = model::module_name(block, task.projection);
    one.record.bits = task.grid.bits;
    one.record.group = task.grid.group;
    one.record.weighting = "round_to_nearest";
    one.record.objective = quant::objective(w, quant::dequantize(one.matrix), identity);
    one.record.objective_rounded = one.record.objective;
    one.record.bits_per_weight = quant::bits_per_weight(w.size(1), task.grid);
    solved.push_back(std::move(one));
  }
  return solved;
}

}  // namespace isobath::pipeline
