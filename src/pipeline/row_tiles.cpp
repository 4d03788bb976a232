#include "row_tiles.hpp"

#include <ATen/ATen.h>

#include <cmath>
#include <isobath/core/trace.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/pipeline/tile_deal.hpp>
#include <isobath/quant/correction.hpp>
#include <isobath/quant/refine.hpp>
#include <isobath/quant/row_solver.hpp>
#include <limits>
#include <map>

namespace isobath::pipeline {
namespace {

// Of a module's tiles, those whose rounding is judged when it is estimated; the first is one of them.
constexpr int64_t kSampledTiles = 16;

// Of work, in multiply-adds of an f32 product: a weight's grid and code, an f64 multiply-add of a
// factorization.
constexpr double kCostOfFit = 1000, kCostOfFactorization = 4;

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

}  // namespace

/// This rank's tiles of the rows of one module that a unit serves.
class SetRows::RowTiles {
 public:
  /// rows: of `weight`, one by one, or undefined: all of them, the first of which is `first_row` of the
  /// module.
  RowTiles(const Session& session, const SolverUnit& unit, const at::Tensor& weight, const at::Tensor& rows,
           int64_t first_row, quant::QuantizedMatrix matrix)
      : session_(session),
        unit_(unit),
        matrix_(std::move(matrix)),
        weight_(weight),
        rows_(rows),
        first_row_(first_row),
        n_rows_(rows.defined() ? rows.size(0) : weight.size(0)),
        height_(quant::tile_rows(n_rows_)),
        n_tiles_((n_rows_ + height_ - 1) / height_),
        every_(weight.size(1) < kSampledColumns ? 1 : kSampledTiles),
        objectives_(at::zeros({n_tiles_, 3}, at::kDouble)) {}

  [[nodiscard]] TileWork work() const {
    const auto n_columns = static_cast<double>(weight_.size(1));
    const double weights = static_cast<double>(height_) * n_columns, fit = weights * kCostOfFit,
                 product = weights * n_columns / 2;
    // Half a product to load the errors, and one a sweep; W C, two substitutions, and the objective again.
    const config::Quantization& quantization = session_.config.quantization;
    const auto sweeps = static_cast<double>(quantization.refinement.sweeps);
    const double products = 1 + (sweeps > 0 ? 1 + 2 * sweeps : 0) + (quantization.asymmetric.is_on() ? 5 : 0);
    return {n_tiles_, every_, fit + products * product, fit, product};
  }
  void deal(TileShare share) { share_ = std::move(share); }

  void round_early() { round(share_.early); }

  /// Where an asymmetric correction is asked for; then panels of C and, for qep, of the ridge factor go to
  /// corrected().
  void begin_correction() {
    if (share_.solved.size() == 0) return;
    // On the CPU a strip is what one thread keeps in its cache.
    corrected_.emplace(weights_of(own_rows()).to(session_.device),
                       session_.device.is_cpu() ? quant::kRowTile : height_);
    if (unit_.layout.n_residual == 0) return;
    const Range own = own_rows();
    corrected_->add_residual(rows_.defined()
                                 ? rows_.slice(0, own.begin, own.end)
                                 : at::arange(first_row_ + own.begin, first_row_ + own.end, at::kLong),
                             session_.config.quantization.asymmetric.residual);
  }
  [[nodiscard]] std::optional<quant::CorrectedRows>& corrected() { return corrected_; }

  /// To be called when the factor is there, but for its panels.
  void begin() {
    if (unit_.factor.failed) return;
    round(share_.late);
    for (auto& [tile, difference] : differences_)
      rounded_.emplace_back(tile, quant::FactoredObjective(std::exchange(difference, {}), unit_.factor));
    differences_.clear();
    if (share_.solved.size() == 0) return;
    const at::Tensor own = weights_of(own_rows()).to(session_.device);
    target_ = corrected_ ? target_of(own) : own;
    solver_.emplace(target_, unit_.factor, matrix_.spec, height_);
  }

  void advance(const at::Tensor& panel) {
    if (solver_) solver_->advance(panel);
    for (auto& [tile, objective] : rounded_) objective.advance(panel);
  }

  [[nodiscard]] int64_t group_width() const {
    return weight_.size(1) / quant::n_groups(weight_.size(1), matrix_.spec);
  }
  /// After the last panel, where codes are refined; then every slab goes to refiner().
  void begin_refinement() {
    if (!solver_) return;
    const quant::QuantizedMatrix own = rows_of(matrix_, own_rows());
    copy_rows(own, solver_->take());
    solver_.reset();
    refiner_.emplace(own, target_, unit_.factor);
  }
  [[nodiscard]] std::optional<quant::Refiner>& refiner() { return refiner_; }
  /// On every rank.
  void count_sweeps(int64_t n) { n_sweeps_ = n; }

  /// This rank's codes are what they will be. With a correction they were not chosen for the original
  /// weights: their objective takes the factor's panels once more, by `judge`.
  void settle() {
    if (!solver_ && !refiner_) return;
    const at::Tensor chosen = corrected_ ? at::Tensor()
                              : refiner_ ? refiner_->objectives(height_)
                                         : solver_->objectives();
    copy_rows(rows_of(matrix_, own_rows()), refiner_ ? refiner_->take() : solver_->take());
    solver_.reset();
    refiner_.reset();
    target_.reset();
    for (int64_t tile = share_.solved.begin; tile < share_.solved.end; ++tile)
      if (corrected_)
        judged_.emplace_back(tile, quant::FactoredObjective(difference_of(tile), unit_.factor));
      else
        objectives_[tile][1] = chosen[tile - share_.solved.begin];
  }
  void judge(const at::Tensor& panel) {
    for (auto& [tile, objective] : judged_) objective.advance(panel);
  }

  /// Writes this rank's codes and shares those of all.
  void finish(ModuleRecord& record) {
    if (unit_.factor.failed) keep_nearest();
    for (const auto& [tile, objective] : rounded_) objectives_[tile][0] = objective.value();
    for (const auto& [tile, objective] : judged_) {
      objectives_[tile][1] = objective.value();
      const Range rows = rows_in(tile);
      const int64_t first_row = own_rows().begin;
      objectives_[tile][2] =
          quant::asymmetric_objective(objective.value(), difference_of(tile),
                                      corrected_->products({rows.begin - first_row, rows.end - first_row}));
    }
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
    record.n_sweeps = std::max(record.n_sweeps, n_sweeps_);
    record.objective_rounded += rounded * static_cast<double>(n_rows_) / static_cast<double>(n_sampled_rows);
    if (session_.config.quantization.asymmetric.is_on() && !unit_.factor.failed)
      record.objective_asymmetric = record.objective_asymmetric.value_or(0) + asymmetric;
  }

 private:
  [[nodiscard]] at::Tensor target_of(const at::Tensor& own) {
    const double strength = session_.config.quantization.asymmetric.strength;
    if (!unit_.correction.defined()) return corrected_->take_solution().mul_(strength).add_(own);
    // Tile by tile: the bits of a product may depend on its number of rows, which must not be that of a rank.
    const at::Tensor correction = unit_.correction.to(session_.device);
    std::vector<at::Tensor> tiles;
    for (const at::Tensor& tile : own.split(height_))
      tiles.push_back(quant::corrected(tile, correction, strength));
    return at::cat(tiles);
  }
  /// Ŵ − W, 0 in dead columns, where panels of the factor come to.
  [[nodiscard]] at::Tensor difference_of(int64_t tile) const {
    at::Tensor difference = quant::dequantize(rows_of(matrix_, rows_in(tile))).to(at::kFloat) - tile_of(tile);
    return difference.masked_fill_(unit_.factor.dead, 0).to(session_.device);
  }
  [[nodiscard]] Range own_rows() const {
    return {share_.solved.begin * height_, std::min(n_rows_, share_.solved.end * height_)};
  }
  [[nodiscard]] Range rows_in(int64_t tile) const {
    return {tile * height_, std::min(n_rows_, (tile + 1) * height_)};
  }
  [[nodiscard]] at::Tensor weights_of(Range rows) const {
    return rows_.defined() ? weight_.index_select(0, rows_.slice(0, rows.begin, rows.end))
                           : weight_.slice(0, rows.begin, rows.end);
  }
  [[nodiscard]] at::Tensor tile_of(int64_t tile) const {
    return weights_of(rows_in(tile)).to(at::kCPU, at::kFloat).contiguous();
  }

  void round(const std::vector<int64_t>& tiles) {
    for (const int64_t tile : tiles) {
      const at::Tensor original = tile_of(tile);
      const at::Tensor rounded =
          quant::dequantize(quant::round_to_nearest(original, {}, matrix_.spec)).to(at::kFloat);
      differences_.emplace_back(tile, (rounded - original).to(session_.device));
    }
  }

  void keep_nearest() {
    for (int64_t tile = share_.solved.begin; tile < share_.solved.end; ++tile) {
      copy_rows(rows_of(matrix_, rows_in(tile)), quant::round_to_nearest(tile_of(tile), {}, matrix_.spec));
      objectives_[tile].fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }

  const Session& session_;
  const SolverUnit& unit_;
  quant::QuantizedMatrix matrix_;  ///< all rows; shares its tensors with the module's
  at::Tensor weight_;              ///< [rows, C], or of the whole module where rows_ choose
  at::Tensor rows_;                ///< [n_rows] i64, or undefined
  int64_t first_row_, n_rows_, height_, n_tiles_, every_;
  int64_t n_sweeps_ = 0;
  TileShare share_;
  at::Tensor objectives_;                          ///< [tiles, 3] f64: rounded, chosen, asymmetric
  std::optional<quant::CorrectedRows> corrected_;  ///< this rank's rows
  at::Tensor target_;                              ///< the same, corrected
  std::optional<quant::RowSolver> solver_;
  std::optional<quant::Refiner> refiner_;                    ///< takes over from the solver
  std::vector<std::pair<int64_t, at::Tensor>> differences_;  ///< of rounded tiles, until the factor is there
  std::vector<std::pair<int64_t, quant::FactoredObjective>> rounded_, judged_;
};

SetRows::SetRows(const Session& session, const std::vector<SolverUnit*>& units,
                 const std::vector<SolveTask>& tasks, const model::BlockWeights& weights,
                 const std::vector<Solved>& solved)
    : session_(session), units_(units), modules_(units.size()) {
  const comm::Communicator& world = session.world();
  std::vector<double> factorization(static_cast<size_t>(world.size()), 0.0);
  std::vector<TileWork> work;
  for (size_t u = 0; u < units.size(); ++u) {
    const SolverUnit& unit = *units[u];
    for (const SolverUnit::Rows& served : unit.serves) {
      const at::Tensor& weight = weights[tasks[served.task].projection].weight;
      const at::Tensor& order = tasks[served.task].row_groups.order;
      const Range& rows = served.rows;
      const bool is_scattered = order.defined();
      modules_[u].emplace_back(
          session, unit, is_scattered ? weight : weight.slice(0, rows.begin, rows.end),
          is_scattered ? order.slice(0, rows.begin, rows.end).to(weight.device()) : at::Tensor(), rows.begin,
          rows_of(solved[served.task].matrix, rows));
      work.push_back(modules_[u].back().work());
    }
    // All ranks factorize what is spread.
    if (!unit.layout.is_spread)
      factorization[static_cast<size_t>(unit.root)] +=
          (session.config.quantization.asymmetric.is_on() ? 2 : 1) * kCostOfFactorization *
          std::pow(static_cast<double>(unit.layout.columns.back().end), 3) / 6;
  }
  std::vector<TileShare> shares = deal_tiles(work, factorization, world.rank());
  auto share = shares.begin();
  for (std::vector<RowTiles>& of_unit : modules_)
    for (RowTiles& module : of_unit) module.deal(std::move(*share++));
}
SetRows::~SetRows() = default;

void SetRows::round() {
  const trace::Span span("round tiles");
  for (std::vector<RowTiles>& of_unit : modules_)
    for (RowTiles& module : of_unit) module.round_early();
}

void SetRows::solve(std::vector<Solved>& solved) {
  const size_t n_panels = units_.front()->layout.columns.size();
  const bool refines = session_.config.quantization.refinement.sweeps > 0;
  const bool is_asymmetric = session_.config.quantization.asymmetric.is_on();
  // A factor small enough goes to all ranks at once: then none of them waits before all its tiles are solved.
  if (is_everywhere())
    for (SolverUnit* unit : units_)
      for (size_t p = 0; p < n_panels && !unit->factor.failed; ++p)
        unit->factor.panels[p] = share_panel(unit->factor, unit->layout, p, *session_.devices);
  if (is_asymmetric)
    for (size_t u = 0; u < units_.size(); ++u) correct(u);
  {
    const trace::Span span("begin rows");
    for (std::vector<RowTiles>& of_unit : modules_)
      for (RowTiles& module : of_unit) module.begin();
  }
  for (size_t p = 0; p < n_panels; ++p)
    for (size_t u = 0; u < units_.size(); ++u) {
      if (units_[u]->factor.failed) continue;
      const at::Tensor panel = panel_of(units_[u]->factor, *units_[u], p);
      if (!refines && !is_asymmetric) units_[u]->factor.panels[p].reset();
      const trace::Span span("solve rows");
      for (RowTiles& module : modules_[u]) module.advance(panel);
    }
  for (size_t u = 0; u < units_.size(); ++u) {
    if (refines) refine(u);
    for (RowTiles& module : modules_[u]) module.settle();
    for (size_t p = 0; p < n_panels && is_asymmetric && !units_[u]->factor.failed; ++p) {
      const at::Tensor panel = panel_of(units_[u]->factor, *units_[u], p);
      const trace::Span span("objectives");
      for (RowTiles& module : modules_[u]) module.judge(panel);
    }
    units_[u]->factor.panels.assign(n_panels, at::Tensor());
  }
  const trace::Span span("codes to all ranks");
  for (size_t u = 0; u < units_.size(); ++u)
    for (size_t m = 0; m < modules_[u].size(); ++m)
      modules_[u][m].finish(solved[units_[u]->serves[m].task].record);
}

bool SetRows::is_everywhere() const {
  return units_.front()->layout.columns.back().end <= quant::kWholeColumns;
}

at::Tensor SetRows::panel_of(const quant::Factor& factor, const SolverUnit& unit, size_t panel) const {
  return is_everywhere() ? factor.panels[panel] : share_panel(factor, unit.layout, panel, *session_.devices);
}

void SetRows::correct(size_t u) {
  SolverUnit& unit = *units_[u];
  if (unit.factor.failed) return;
  const std::vector<Range>& columns = unit.layout.columns;
  const auto for_each = [&](const auto& visit) {
    const trace::Span span("correct rows");
    for (RowTiles& module : modules_[u])
      if (module.corrected()) visit(*module.corrected());
  };
  for (RowTiles& module : modules_[u]) module.begin_correction();
  for (size_t p = 0; p < columns.size(); ++p) {
    const at::Tensor c = share_cross_panel(unit.c_panels[p], unit.layout, p, *session_.devices);
    unit.c_panels[p].reset();
    for_each([&](quant::CorrectedRows& rows) { rows.multiply(c, columns[p]); });
  }
  quant::Factor& factor = unit.ridge_factor;
  if (unit.correction.defined()) return;
  if (is_everywhere())
    for (size_t p = 0; p < columns.size(); ++p)
      factor.panels[p] = share_panel(factor, unit.layout, p, *session_.devices);
  for (size_t p = columns.size(); p-- > 0;) {
    const at::Tensor panel = panel_of(factor, unit, p);
    for_each([&](quant::CorrectedRows& rows) { rows.substitute_back(panel); });
  }
  for (size_t p = 0; p < columns.size(); ++p) {
    const at::Tensor panel = panel_of(factor, unit, p);
    factor.panels[p].reset();
    for_each([&](quant::CorrectedRows& rows) { rows.substitute_forward(panel, factor.curvature); });
  }
}

void SetRows::refine(size_t u) {
  quant::Factor& factor = units_[u]->factor;
  if (factor.failed) return;
  const PanelLayout& layout = units_[u]->layout;
  for (RowTiles& module : modules_[u]) module.begin_refinement();
  // Modules of one unit may have groups of their own: each sees slabs that suit it.
  std::map<int64_t, std::vector<RowTiles*>> by_width;
  for (RowTiles& module : modules_[u]) by_width[module.group_width()].push_back(&module);
  const int64_t most = session_.config.quantization.refinement.sweeps;
  for (auto& [width, modules] : by_width) {
    bool gains = true;
    for (int64_t pass = 0; pass <= most && gains; ++pass) {
      for (const Range& columns : quant::refinement_slabs(layout.columns, width)) {
        const at::Tensor rows = share_slab(factor, layout, columns, is_everywhere(), *session_.devices);
        const trace::Span span("refine rows");
        const quant::Slab slab(columns, rows, factor, pass > 0);
        for (RowTiles* module : modules)
          if (std::optional<quant::Refiner>& refiner = module->refiner())
            pass == 0 ? refiner->load(slab) : refiner->sweep(slab);
      }
      for (RowTiles* module : modules) module->count_sweeps(pass);
      if (pass == 0 || pass == most) continue;
      gains = session_.world().any(std::any_of(modules.begin(), modules.end(), [](RowTiles* module) {
        return module->refiner() && !module->refiner()->is_settled();
      }));
    }
  }
}

}  // namespace isobath::pipeline
