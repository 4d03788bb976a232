#include <isobath/pipeline/block_solver.hpp>

#include <ATen/ATen.h>

#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/quant/refine.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <isobath/sensitivity/token_weights.hpp>
#include <limits>

namespace isobath::pipeline {

/// One H and the rows it serves: a row group of one module, or every row of all modules of the set when D
/// = 1.
struct BlockSolver::Unit {
  struct Rows {
    size_t task;
    Range rows;
  };
  std::vector<Rows> serves;
  at::Tensor token_weights;  // [n, T] f32 robust and normalised to mean 1; undefined: D = 1
  double n_effective = 0;
  int root = 0;          // rank that holds H and factorizes
  at::Tensor h;          // [d, d] f32 on root
  quant::Factor factor;  // replicated
  at::Tensor damped_h;   // [d, d] f32, replicated; only when codes are refined
  bool is_weighted = false;
  int64_t n_fallbacks = 0;
};

namespace {

// [n, T] D of one row group: clipped, raised, and scaled to mean 1 so that objectives of different modules
// can be compared.
at::Tensor robust_weights(const at::Tensor& raw, const config::Sensitivity& sensitivity) {
  const double threshold = sensitivity::clip_threshold(raw, sensitivity.clip_quantile);
  const at::Tensor robust = sensitivity::robust(raw, threshold, sensitivity.exponent);
  const double mean = robust.sum(at::kDouble).item<double>() / static_cast<double>(robust.numel());
  return mean > 0 ? robust / mean : robust;
}

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

std::vector<BlockSolver::Unit> BlockSolver::make_units(const std::vector<SolveTask>& tasks,
                                                       const model::BlockWeights& weights) const {
  std::vector<Unit> units;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const int64_t n_rows = weights[tasks[t].projection].weight.size(0);
    if (!tasks[t].token_weights.defined()) {
      // D = 1: the modules of a set share one H.
      if (units.empty() || units.back().token_weights.defined()) units.emplace_back();
      units.back().serves.push_back({t, {0, n_rows}});
      continue;
    }
    const int64_t n_groups = tasks[t].token_weights.size(2);
    for (int64_t k = 0; k < n_groups; ++k) {
      Unit unit;
      unit.serves.push_back({t, partition(n_rows, n_groups, k)});
      unit.token_weights = robust_weights(tasks[t].token_weights.select(2, k), session_.config.sensitivity);
      const double sum = unit.token_weights.sum(at::kDouble).item<double>();
      const double squares = unit.token_weights.to(at::kDouble).square().sum().item<double>();
      unit.n_effective = sensitivity::effective_samples(sum, squares);
      unit.is_weighted = true;
      units.push_back(std::move(unit));
    }
  }
  for (size_t u = 0; u < units.size(); ++u) units[u].root = static_cast<int>(u) % session_.world().size();
  return units;
}

void BlockSolver::accumulate(std::vector<Unit>& units, int64_t n_channels,
                             const ForEachInput& for_each_input) const {
  const comm::Communicator& world = session_.world();
  const std::vector<int> owners = calibration_.shards.owners(world.size());
  std::vector<comm::TreeSum> trees;
  std::vector<sensitivity::Covariance> shard_sums;
  for (size_t u = 0; u < units.size(); ++u) {
    trees.emplace_back(owners, world.rank());
    shard_sums.emplace_back(n_channels, session_.device);
  }
  int64_t shard = -1;
  const auto close_shard = [&] {
    if (shard < 0) return;
    for (size_t u = 0; u < units.size(); ++u) {
      trees[u].add(shard, shard_sums[u].value().cpu());
      shard_sums[u] = sensitivity::Covariance(n_channels, session_.device);
    }
  };
  for_each_input([&](const data::Microbatch& microbatch, const at::Tensor& x) {
    if (microbatch.shard != shard) {
      close_shard();
      shard = microbatch.shard;
    }
    const at::Tensor rows = x.flatten(0, 1);
    for (size_t u = 0; u < units.size(); ++u) {
      at::Tensor weights;
      if (units[u].token_weights.defined()) {
        weights =
            units[u].token_weights.slice(0, microbatch.sequences.begin, microbatch.sequences.end).flatten();
      } else if (const at::Tensor mask = calibration_.mask_of(microbatch.sequences); mask.defined()) {
        weights = mask.flatten().to(at::kFloat);
      }
      shard_sums[u].add(rows, weights.defined() ? weights.to(session_.device) : weights);
    }
  });
  close_shard();
  for (Unit& unit : units) {
    at::Tensor sum = trees[static_cast<size_t>(&unit - units.data())].reduce_to(unit.root, world);
    if (world.rank() == unit.root) unit.h = std::move(sum);
  }
}

void BlockSolver::factorize(Unit& unit) const {
  // H is positive semidefinite whatever D is; the trailing rank of few effective samples is what damping is
  // for.
  const comm::Communicator& world = session_.world();
  const bool is_root = world.rank() == unit.root;
  std::array<int64_t, 3> counts{};
  std::array<double, 1> damping{};
  if (is_root) {
    unit.factor = quant::factorize(unit.h, factor_spec_);
    counts = {unit.h.size(0), unit.factor.n_fallbacks, unit.factor.failed ? 1 : 0};
    damping = {unit.factor.damping};
  }
  world.broadcast(std::span<int64_t>(counts), unit.root);
  world.broadcast(std::span<double>(damping), unit.root);
  const int64_t d = counts[0];
  unit.n_fallbacks += counts[1];
  if (!is_root) {
    unit.factor.n_fallbacks = counts[1];
    unit.factor.failed = counts[2] != 0;
    unit.factor.damping = damping[0];
  }
  if (unit.factor.failed) return;
  if (!is_root) {
    unit.factor.upper = at::empty({d, d}, at::kFloat);
    unit.factor.order = at::empty({d}, at::kLong);
    unit.factor.dead = at::empty({d}, at::kBool);
    unit.factor.importance = at::empty({d}, at::kFloat);
  }
  for (at::Tensor* part :
       {&unit.factor.upper, &unit.factor.order, &unit.factor.dead, &unit.factor.importance}) {
    *part = part->contiguous();
    world.broadcast(*part, unit.root);
  }
  if (n_sweeps_ == 0) return;
  unit.damped_h =
      is_root ? quant::damped_hessian(unit.h, unit.factor.damping) : at::empty({d, d}, at::kFloat);
  world.broadcast(unit.damped_h, unit.root);
}

void BlockSolver::solve_rows(const Unit& unit, const SolveTask& task, const at::Tensor& weight,
                             quant::QuantizedMatrix& matrix) const {
  const comm::Communicator& world = session_.world();
  const int64_t n_rows = weight.size(0);
  const int64_t n_tiles = (n_rows + quant::kRowTile - 1) / quant::kRowTile;
  const Range tiles = partition(n_tiles, world.size(), world.rank());
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t begin = tile * quant::kRowTile, end = std::min(n_rows, begin + quant::kRowTile);
    const at::Tensor w = weight.slice(0, begin, end).to(at::kCPU, at::kFloat).contiguous();
    quant::QuantizedMatrix part = unit.factor.failed ? quant::round_to_nearest(w, {}, task.grid)
                                                     : quant::gptq(w, unit.factor, task.grid);
    if (unit.damped_h.defined()) part = quant::refine(part, w, unit.damped_h, n_sweeps_);
    put_rows(matrix, begin, part);
  }
  for (at::Tensor* part : {&matrix.codes, &matrix.scale, &matrix.zero}) share_disjoint(*part, world);
}

void BlockSolver::score(const Unit& unit, const at::Tensor& weight, const quant::QuantizedMatrix& matrix,
                        ModuleRecord& record) const {
  const comm::Communicator& world = session_.world();
  std::array<double, 2> objectives{};
  if (world.rank() == unit.root) {
    const at::Tensor w = weight.to(at::kCPU, at::kFloat).contiguous();
    const auto rounded = quant::round_to_nearest(w, {}, matrix.spec);
    objectives = {quant::objective(w, quant::dequantize(rounded), unit.h),
                  quant::objective(w, quant::dequantize(matrix), unit.h)};
  }
  world.broadcast(std::span<double>(objectives), unit.root);
  record.objective_rounded += objectives[0];
  record.objective += objectives[1];
}

std::vector<Solved> BlockSolver::solve(int64_t block, const std::vector<SolveTask>& tasks,
                                       const model::BlockWeights& weights,
                                       const ForEachInput& for_each_input) const {
  const Timer timer;
  std::vector<Unit> units = make_units(tasks, weights);
  const int64_t n_channels = weights[tasks.front().projection].weight.size(1);
  accumulate(units, n_channels, for_each_input);
  for (Unit& unit : units) factorize(unit);

  // A weighted H that no damping saved is replaced by the plain one; where that fails too, the rows are
  // rounded.
  std::vector<Unit*> failed;
  for (Unit& unit : units)
    if (unit.factor.failed && unit.is_weighted) failed.push_back(&unit);
  if (!failed.empty()) {
    std::vector<Unit> plain(1);
    accumulate(plain, n_channels, for_each_input);
    factorize(plain[0]);
    for (Unit* unit : failed) {
      unit->h = plain[0].h;
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
    for (const Unit& unit : units) {
      for (const Unit::Rows& served : unit.serves) {
        if (served.task != t) continue;
        const at::Tensor rows = weight.slice(0, served.rows.begin, served.rows.end);
        quant::QuantizedMatrix part = zero_matrix(rows.size(0), rows.size(1), tasks[t].grid);
        solve_rows(unit, tasks[t], rows, part);
        score(unit, rows, part, record);
        put_rows(result.matrix, served.rows.begin, part);
        record.damping = std::max(record.damping, unit.factor.damping);
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

}  // namespace isobath::pipeline
