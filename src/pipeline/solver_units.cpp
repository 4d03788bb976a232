#include "solver_units.hpp"

#include <ATen/ATen.h>

#include <isobath/comm/tree_sum.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/kernels/squares.hpp>
#include <isobath/plan/job.hpp>
#include <isobath/quant/correction.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <isobath/sensitivity/cross_covariance.hpp>
#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::pipeline {
namespace {

// [n, T] D of one row group: clipped, raised, and scaled to mean 1 so that objectives of different modules
// can be compared.
at::Tensor robust_weights(const at::Tensor& raw, const config::Sensitivity& sensitivity) {
  const double threshold = sensitivity::clip_threshold(raw, sensitivity.clip_quantile);
  const at::Tensor robust = sensitivity::robust(raw, threshold, sensitivity.exponent);
  const double mean = robust.sum(at::kDouble).item<double>() / static_cast<double>(robust.numel());
  return mean > 0 ? robust / mean : robust;
}

// Token weights of a microbatch's rows [b·T]; undefined: all are 1.
at::Tensor weights_of(const SolverUnit& unit, const CalibrationSet& calibration,
                      const data::Microbatch& microbatch) {
  if (unit.token_weights.defined())
    return unit.token_weights.slice(0, microbatch.sequences.begin, microbatch.sequences.end).flatten();
  const at::Tensor mask = calibration.mask_of(microbatch.sequences);
  return mask.defined() ? mask.flatten().to(at::kFloat) : mask;
}

Original flattened(const Original& original) {
  const auto rows = [](const at::Tensor& values) { return values.defined() ? values.flatten(0, 1) : values; };
  return {.input = rows(original.input), .residual = rows(original.residual)};
}

// Calls `visit` for each local microbatch and `close_shard(shard)` after the last one of each logical shard.
void for_each_shard(const ForEachInput& for_each_input, const VisitInput& visit,
                    const std::function<void(int64_t)>& close_shard) {
  int64_t shard = -1;
  for_each_input([&](const data::Microbatch& microbatch, const at::Tensor& x, const Original& original) {
    if (shard >= 0 && microbatch.shard != shard) close_shard(shard);
    shard = microbatch.shard;
    visit(microbatch, x, original);
  });
  if (shard >= 0) close_shard(shard);
}

}  // namespace

std::vector<SolverUnit> make_units(const Session& session, const std::vector<SolveTask>& tasks,
                                   const model::BlockWeights& weights, int64_t block) {
  std::vector<SolverUnit> units;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const int64_t n_rows = weights[tasks[t].projection].weight.size(0);
    if (!tasks[t].token_weights.defined()) {
      // D = 1: the modules of a set share one H.
      if (units.empty() || units.back().token_weights.defined()) units.emplace_back();
      units.back().serves.push_back({t, {0, n_rows}});
      continue;
    }
    const std::vector<Range>& groups = tasks[t].row_groups.ranges;
    for (int64_t k = 0; k < std::ssize(groups); ++k) {
      SolverUnit unit;
      unit.serves.push_back({t, groups[static_cast<size_t>(k)]});
      unit.token_weights = robust_weights(tasks[t].token_weights.select(2, k), session.config.sensitivity);
      const double sum = unit.token_weights.sum(at::kDouble).item<double>();
      const double squares = unit.token_weights.to(at::kDouble).square().sum().item<double>();
      unit.n_effective = sensitivity::effective_samples(sum, squares);
      unit.is_weighted = true;
      units.push_back(std::move(unit));
    }
  }
  // From set to set and block to block another rank comes first.
  const int64_t first = block + static_cast<int64_t>(tasks.front().projection);
  const int64_t n_channels = weights[tasks.front().projection].weight.size(1);
  for (size_t u = 0; u < units.size(); ++u) {
    units[u].root = static_cast<int>((first + static_cast<int64_t>(u)) % session.world().size());
    units[u].layout = {
        .columns = quant::column_panels(n_channels, quant::kPanel),
        .first_owner = units[u].root,
        .n_ranks = session.world().size(),
        .n_residual =
            plan::residual_channels(session.config.quantization, session.model(), tasks.front().projection),
        .is_spread = n_channels > quant::kWholeColumns && !plan::needs_whole(session.config.quantization)};
  }
  return units;
}

void shrink_weights(const Session& session, const CalibrationSet& calibration, std::vector<SolverUnit>& units,
                    int64_t n_channels, const ForEachInput& for_each_input) {
  const double configured = session.config.sensitivity.shrinkage;
  if (configured == 0) return;
  // tr(XᵀDX) = Σ D_i ‖x_i‖²: one number a unit, and one for D = 1.
  const comm::Communicator& world = session.world();
  comm::TreeSum tree(calibration.shards.owners(world.size()), world.rank());
  const auto n_units = static_cast<int64_t>(units.size());
  at::Tensor traces = at::zeros({n_units + 1}, at::kDouble);
  const SolverUnit equal;
  for_each_shard(
      for_each_input,
      [&](const data::Microbatch& microbatch, const at::Tensor& x, const Original&) {
        const at::Tensor squares = kernels::row_squares(x.flatten(0, 1)).cpu();
        for (int64_t u = 0; u <= n_units; ++u) {
          const at::Tensor weights =
              weights_of(u < n_units ? units[static_cast<size_t>(u)] : equal, calibration, microbatch);
          // 0·inf is NaN: padding may hold anything.
          traces[u] +=
              (weights.defined() ? at::where(weights > 0, squares * weights, 0.0) : squares).sum(at::kDouble);
        }
      },
      [&](int64_t shard) {
        tree.add(shard, traces);
        traces = at::zeros({n_units + 1}, at::kDouble);
      });
  at::Tensor total = tree.reduce_to(0, world);
  if (!total.defined()) total = at::zeros({n_units + 1}, at::kDouble);
  world.broadcast(total, 0);

  const at::Tensor real = calibration.mask_of({0, calibration.tokens.n_sequences()});
  const auto plain = total[n_units].item<double>();
  for (int64_t u = 0; u < n_units; ++u) {
    SolverUnit& unit = units[static_cast<size_t>(u)];
    if (!unit.is_weighted || !(plain > 0)) continue;
    unit.shrinkage =
        configured < 0 ? sensitivity::automatic_shrinkage(unit.n_effective, n_channels) : configured;
    unit.token_weights =
        sensitivity::shrunk(unit.token_weights, real, unit.shrinkage, total[u].item<double>() / plain);
  }
}

void accumulate(const Session& session, const CalibrationSet& calibration,
                const std::vector<SolverUnit*>& units, int64_t n_channels,
                const ForEachInput& for_each_input) {
  const comm::Communicator& world = session.world();
  const std::vector<int> owners = calibration.shards.owners(world.size());
  struct Sums {
    comm::TreeSum h_tree, c_tree;
    sensitivity::Covariance h;
    std::optional<sensitivity::CrossCovariance> c;
  };
  const bool with_cross = session.config.quantization.asymmetric.is_on();
  std::vector<Sums> sums;
  for (size_t u = 0; u < units.size(); ++u)
    sums.push_back({comm::TreeSum(owners, world.rank()), comm::TreeSum(owners, world.rank()),
                    sensitivity::Covariance(n_channels, session.device),
                    with_cross ? std::optional<sensitivity::CrossCovariance>(
                                     std::in_place, n_channels, session.device, units[u]->layout.n_residual)
                               : std::nullopt});
  std::optional<trace::Span> span(std::in_place, "covariance");
  for_each_shard(
      for_each_input,
      [&](const data::Microbatch& microbatch, const at::Tensor& x, const Original& original) {
        const at::Tensor rows = x.flatten(0, 1);
        const Original of_rows = flattened(original);
        for (size_t u = 0; u < units.size(); ++u) {
          at::Tensor weights = weights_of(*units[u], calibration, microbatch);
          if (weights.defined()) weights = weights.to(session.device);
          sums[u].h.add(rows, weights);
          if (!with_cross) continue;
          sums[u].c->add(rows, of_rows.input, weights, of_rows.residual);
        }
      },
      [&](int64_t shard) {
        for (Sums& sum : sums) {
          sum.h_tree.add(shard, sum.h.take_upper());
          if (with_cross) sum.c_tree.add(shard, sum.c->take().front());
        }
      });
  span.emplace("reduction of H");
  for (size_t u = 0; u < units.size(); ++u) {
    at::Tensor h = sums[u].h_tree.reduce_to(units[u]->root, world);
    at::Tensor c = with_cross ? sums[u].c_tree.reduce_to(units[u]->root, world) : at::Tensor();
    if (world.rank() != units[u]->root) continue;
    units[u]->h = sensitivity::mirrored(std::move(h));
    units[u]->c = std::move(c);
  }
}

// Of panels that are still needed.
static void factorize_ridge(const std::vector<at::Tensor>& panels, const at::Tensor& diagonal, double ridge,
                            SolverUnit& unit, const comm::DeviceCommunicator& devices) {
  const quant::FactorSpec spec = quant::ridge_spec(ridge);
  unit.ridge_factor = quant::factor_of_diagonal(diagonal, spec);
  do {
    if (factorize_panels(panels, unit.layout, unit.ridge_factor, devices)) return;
  } while (quant::raise_damping(unit.ridge_factor, spec));
  quant::check_ridge(unit.ridge_factor);
}

void factorize_spread(const Session& session, const CalibrationSet& calibration, SolverUnit& unit,
                      const quant::FactorSpec& spec, const ForEachInput& for_each_input) {
  const comm::Communicator& world = session.world();
  const config::Asymmetric& asymmetric = session.config.quantization.asymmetric;
  const std::vector<int> owners = calibration.shards.owners(world.size());
  const ForEachRows for_each_rows = [&](const VisitRows& visit,
                                        const std::function<void(int64_t)>& close_shard) {
    for_each_shard(
        for_each_input,
        [&](const data::Microbatch& microbatch, const at::Tensor& x, const Original& original) {
          at::Tensor weights = weights_of(unit, calibration, microbatch);
          if (weights.defined()) weights = weights.to(session.device);
          visit(x.flatten(0, 1), flattened(original), weights);
        },
        close_shard);
  };
  bool is_first = true, is_done = false;
  do {
    std::vector<at::Tensor> panels = sum_panels(unit.layout, owners, world, session.device, for_each_rows);
    if (is_first) {
      const at::Tensor diagonal = share_diagonal(panels, unit.layout, world);
      unit.factor = quant::factor_of_diagonal(diagonal, spec);
      if (asymmetric.is_on()) factorize_ridge(panels, diagonal, asymmetric.ridge, unit, *session.devices);
    }
    is_first = false;
    is_done = factorize_panels(std::move(panels), unit.layout, unit.factor, *session.devices);
  } while (!is_done && quant::raise_damping(unit.factor, spec));
  if (is_done && asymmetric.is_on())
    unit.c_panels = sum_cross_panels(unit.layout, owners, world, session.device, for_each_rows);
}

}  // namespace isobath::pipeline
