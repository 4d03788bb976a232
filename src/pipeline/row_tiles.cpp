#include "row_tiles.hpp"

#include <ATen/ATen.h>

#include <isobath/core/trace.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/quant/correction.hpp>
#include <isobath/quant/refine.hpp>
#include <isobath/quant/row_solver.hpp>
#include <limits>

namespace isobath::pipeline {
namespace {

// Of a module's tiles, those whose rounding is judged when it is estimated; the first is one of them.
constexpr int64_t kSampledTiles = 16;

quant::QuantizedMatrix rows_of(const quant::QuantizedMatrix& whole, Range rows) {
  return {.spec = whole.spec,
          .codes = whole.codes.slice(0, rows.begin, rows.end),
          .scale = whole.scale.slice(0, rows.begin, rows.end),
          .zero = whole.zero.slice(0, rows.begin, rows.end)};
}

void copy_rows(quant::QuantizedMatrix to, const quant::QuantizedMatrix& from) {
  to.codes.copy_(from.codes);
  to.scale.copy_(from.scale);
  to.zero.copy_(from.zero);
}

/// This rank's tiles of the rows of one module that a unit serves.
class RowTiles {
 public:
  RowTiles(const Session& session, const SolverUnit& unit, const at::Tensor& weight,
           quant::QuantizedMatrix matrix)
      : session_(session),
        unit_(unit),
        matrix_(std::move(matrix)),
        weight_(weight),
        height_(quant::tile_rows(weight.size(0))),
        n_tiles_((weight.size(0) + height_ - 1) / height_),
        every_(weight.size(1) < kSampledColumns ? 1 : kSampledTiles),
        tiles_(partition(n_tiles_, session.world().size(), session.world().rank())),
        objectives_(at::zeros({n_tiles_, 3}, at::kDouble)) {
    if (tiles_.size() == 0 || unit.factor.failed) return;
    const at::Tensor own = weight.slice(0, tiles_.begin * height_, tiles_.end * height_).cpu();
    target_ = unit.correction.defined()
                  ? quant::corrected(own, unit.correction, session.config.quantization.asymmetric.strength)
                  : own;
    solver_.emplace(target_, unit.factor, matrix_.spec, height_);
    for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile) {
      if (tile % every_ != 0) continue;
      const at::Tensor original = tile_of(weight_, tile);
      const at::Tensor rounded =
          quant::dequantize(quant::round_to_nearest(original, {}, matrix_.spec)).to(at::kFloat);
      rounded_.emplace_back(tile, quant::FactoredObjective(rounded - original, unit.factor));
    }
  }

  void advance(const at::Tensor& panel) {
    if (solver_) solver_->advance(panel);
    for (auto& [tile, objective] : rounded_) objective.advance(panel);
  }

  /// Writes this rank's codes and shares those of all.
  void finish(ModuleRecord& record) {
    if (unit_.factor.failed)
      round();
    else if (solver_)
      choose();
    for (at::Tensor* part : {&matrix_.codes, &matrix_.scale, &matrix_.zero, &objectives_})
      share_disjoint(*part, session_.world());
    // In the order of the tiles, whoever had them.
    double rounded = 0, asymmetric = 0;
    int64_t n_sampled_rows = 0;
    for (int64_t tile = 0; tile < n_tiles_; ++tile) {
      record.objective += objectives_[tile][1].item<double>();
      asymmetric += objectives_[tile][2].item<double>();
      if (tile % every_ != 0) continue;
      rounded += objectives_[tile][0].item<double>();
      n_sampled_rows += rows_in(tile).size();
    }
    record.objective_rounded +=
        rounded * static_cast<double>(weight_.size(0)) / static_cast<double>(n_sampled_rows);
    if (unit_.c.defined()) record.objective_asymmetric = record.objective_asymmetric.value_or(0) + asymmetric;
  }

 private:
  [[nodiscard]] Range rows_in(int64_t tile) const {
    return {tile * height_, std::min(weight_.size(0), (tile + 1) * height_)};
  }
  [[nodiscard]] at::Tensor tile_of(const at::Tensor& rows, int64_t tile) const {
    const Range range = rows_in(tile);
    return rows.slice(0, range.begin, range.end).to(at::kCPU, at::kFloat).contiguous();
  }

  void round() {
    for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile) {
      copy_rows(rows_of(matrix_, rows_in(tile)),
                quant::round_to_nearest(tile_of(weight_, tile), {}, matrix_.spec));
      objectives_[tile].fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }

  void choose() {
    for (const auto& [tile, objective] : rounded_) objectives_[tile][0] = objective.value();
    const at::Tensor chosen = solver_->objectives();
    const int64_t first_row = tiles_.begin * height_;
    copy_rows(rows_of(matrix_, {first_row, first_row + target_.size(0)}), solver_->take());
    solver_.reset();
    for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile)
      objectives_[tile][1] = chosen[tile - tiles_.begin];
    const int64_t n_sweeps = session_.config.quantization.refinement.sweeps;
    if (n_sweeps == 0 && !unit_.correction.defined()) return;
    // The codes are no longer those of the loop, or not chosen for the original weights.
    const at::Tensor damped_h =
        n_sweeps > 0 ? quant::damped_hessian(unit_.h, unit_.factor.damping) : at::Tensor();
    for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile) {
      const Range range = rows_in(tile);
      quant::QuantizedMatrix part = rows_of(matrix_, range);
      if (damped_h.defined()) {
        const at::Tensor target =
            target_.slice(0, range.begin - first_row, range.end - first_row).to(at::kFloat).contiguous();
        part = quant::refine(part, target, damped_h, n_sweeps);
        copy_rows(rows_of(matrix_, range), part);
      }
      const at::Tensor original = tile_of(weight_, tile), values = quant::dequantize(part);
      objectives_[tile][1] = quant::objective(original, values, unit_.h);
      if (unit_.c.defined())
        objectives_[tile][2] = quant::asymmetric_objective(original, values, unit_.h, unit_.c);
    }
  }

  const Session& session_;
  const SolverUnit& unit_;
  quant::QuantizedMatrix matrix_;  ///< all rows; shares its tensors with the module's
  at::Tensor weight_;              ///< [rows, C]
  int64_t height_, n_tiles_, every_;
  Range tiles_;
  at::Tensor objectives_;  ///< [tiles, 3] f64: rounded, chosen, asymmetric
  at::Tensor target_;      ///< this rank's rows, corrected
  std::optional<quant::RowSolver> solver_;
  std::vector<std::pair<int64_t, quant::FactoredObjective>> rounded_;
};

}  // namespace

void solve_rows(const Session& session, SolverUnit& unit, const std::vector<SolveTask>& tasks,
                const model::BlockWeights& weights, std::vector<Solved>& solved) {
  const comm::Communicator& world = session.world();
  std::vector<RowTiles> modules;
  for (const SolverUnit::Rows& served : unit.serves) {
    const at::Tensor& weight = weights[tasks[served.task].projection].weight;
    modules.emplace_back(session, unit, weight.slice(0, served.rows.begin, served.rows.end),
                         rows_of(solved[served.task].matrix, served.rows));
  }
  if (!unit.factor.failed) {
    for (size_t p = 0; p < unit.layout.columns.size(); ++p) {
      const at::Tensor panel = share_panel(unit.factor, unit.layout, p, world);
      unit.factor.panels[p].reset();
      const trace::Span span("solve rows");
      for (RowTiles& module : modules) module.advance(panel);
    }
  }
  const trace::Span span("codes to all ranks");
  for (size_t m = 0; m < modules.size(); ++m) modules[m].finish(solved[unit.serves[m].task].record);
}

}  // namespace isobath::pipeline
