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
  /// rows: of `weight`, one by one, or undefined: all of them.
  RowTiles(const Session& session, const SolverUnit& unit, const at::Tensor& weight, const at::Tensor& rows,
           quant::QuantizedMatrix matrix)
      : session_(session),
        unit_(unit),
        matrix_(std::move(matrix)),
        weight_(weight),
        rows_(rows),
        n_rows_(rows.defined() ? rows.size(0) : weight.size(0)),
        height_(quant::tile_rows(n_rows_)),
        n_tiles_((n_rows_ + height_ - 1) / height_),
        every_(weight.size(1) < kSampledColumns ? 1 : kSampledTiles),
        objectives_(at::zeros({n_tiles_, 3}, at::kDouble)) {}

  [[nodiscard]] TileWork work() const {
    const auto n_columns = static_cast<double>(weight_.size(1));
    const double weights = static_cast<double>(height_) * n_columns, fit = weights * kCostOfFit,
                 product = weights * n_columns / 2;
    return {n_tiles_, every_, fit + product, fit, product};
  }
  void deal(TileShare share) { share_ = std::move(share); }

  void round_early() { round(share_.early); }

  /// To be called when the factor is there, but for its panels.
  void begin() {
    if (unit_.factor.failed) return;
    round(share_.late);
    for (auto& [tile, difference] : differences_)
      rounded_.emplace_back(tile, quant::FactoredObjective(std::exchange(difference, {}), unit_.factor));
    differences_.clear();
    if (share_.solved.size() == 0) return;
    const at::Tensor own = weights_of(own_rows()).cpu();
    target_ = unit_.correction.defined() ? corrected(own) : own;
    solver_.emplace(target_.to(session_.device), unit_.factor, matrix_.spec, height_);
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

  /// Writes this rank's codes and shares those of all.
  void finish(ModuleRecord& record) {
    if (unit_.factor.failed) keep_nearest();
    for (const auto& [tile, objective] : rounded_) objectives_[tile][0] = objective.value();
    if (share_.solved.size() > 0 && !unit_.factor.failed) choose();
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
    record.objective_rounded += rounded * static_cast<double>(n_rows_) / static_cast<double>(n_sampled_rows);
    if (unit_.c.defined()) record.objective_asymmetric = record.objective_asymmetric.value_or(0) + asymmetric;
  }

 private:
  // Tile by tile: the bits of a product may depend on its number of rows, which must not be that of a rank.
  [[nodiscard]] at::Tensor corrected(const at::Tensor& own) const {
    std::vector<at::Tensor> tiles;
    for (const at::Tensor& tile : own.split(height_))
      tiles.push_back(
          quant::corrected(tile, unit_.correction, session_.config.quantization.asymmetric.strength));
    return at::cat(tiles);
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
      differences_.emplace_back(tile, rounded - original);
    }
  }

  void keep_nearest() {
    for (int64_t tile = share_.solved.begin; tile < share_.solved.end; ++tile) {
      copy_rows(rows_of(matrix_, rows_in(tile)), quant::round_to_nearest(tile_of(tile), {}, matrix_.spec));
      objectives_[tile].fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }

  void choose() {
    const at::Tensor chosen = refiner_ ? refiner_->objectives(height_) : solver_->objectives();
    copy_rows(rows_of(matrix_, own_rows()), refiner_ ? refiner_->take() : solver_->take());
    solver_.reset();
    refiner_.reset();
    for (int64_t tile = share_.solved.begin; tile < share_.solved.end; ++tile) {
      objectives_[tile][1] = chosen[tile - share_.solved.begin];
      if (!unit_.correction.defined()) continue;
      // The codes were not chosen for the original weights.
      const at::Tensor original = tile_of(tile), values = quant::dequantize(rows_of(matrix_, rows_in(tile)));
      objectives_[tile][1] = quant::objective(original, values, unit_.h);
      objectives_[tile][2] = quant::asymmetric_objective(original, values, unit_.h, unit_.c);
    }
  }

  const Session& session_;
  const SolverUnit& unit_;
  quant::QuantizedMatrix matrix_;  ///< all rows; shares its tensors with the module's
  at::Tensor weight_;              ///< [rows, C], or of the whole module where rows_ choose
  at::Tensor rows_;                ///< [n_rows] i64, or undefined
  int64_t n_rows_, height_, n_tiles_, every_;
  TileShare share_;
  at::Tensor objectives_;  ///< [tiles, 3] f64: rounded, chosen, asymmetric
  at::Tensor target_;      ///< this rank's rows, corrected
  std::optional<quant::RowSolver> solver_;
  std::optional<quant::Refiner> refiner_;                    ///< takes over from the solver
  std::vector<std::pair<int64_t, at::Tensor>> differences_;  ///< of rounded tiles, until the factor is there
  std::vector<std::pair<int64_t, quant::FactoredObjective>> rounded_;
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
          is_scattered ? order.slice(0, rows.begin, rows.end).to(weight.device()) : at::Tensor(),
          rows_of(solved[served.task].matrix, rows));
      work.push_back(modules_[u].back().work());
    }
    // All ranks factorize what is spread.
    if (!unit.layout.is_spread)
      factorization[static_cast<size_t>(unit.root)] +=
          kCostOfFactorization * std::pow(static_cast<double>(unit.layout.columns.back().end), 3) / 6;
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
  const comm::Communicator& world = session_.world();
  const PanelLayout& layout = units_.front()->layout;
  // A factor small enough goes to all ranks at once: then none of them waits before all its tiles are solved.
  const bool is_everywhere = layout.columns.back().end <= quant::kWholeColumns;
  const bool refines = session_.config.quantization.refinement.sweeps > 0;
  if (is_everywhere)
    for (SolverUnit* unit : units_)
      for (size_t p = 0; p < layout.columns.size() && !unit->factor.failed; ++p)
        unit->factor.panels[p] = share_panel(unit->factor, unit->layout, p, world);
  {
    const trace::Span span("begin rows");
    for (std::vector<RowTiles>& of_unit : modules_)
      for (RowTiles& module : of_unit) module.begin();
  }
  for (size_t p = 0; p < layout.columns.size(); ++p)
    for (size_t u = 0; u < units_.size(); ++u) {
      quant::Factor& factor = units_[u]->factor;
      if (factor.failed) continue;
      const at::Tensor panel =
          is_everywhere ? factor.panels[p] : share_panel(factor, units_[u]->layout, p, world);
      if (!refines) factor.panels[p].reset();
      const trace::Span span("solve rows");
      for (RowTiles& module : modules_[u]) module.advance(panel);
    }
  if (refines)
    for (size_t u = 0; u < units_.size(); ++u) refine(u, is_everywhere);
  const trace::Span span("codes to all ranks");
  for (size_t u = 0; u < units_.size(); ++u)
    for (size_t m = 0; m < modules_[u].size(); ++m)
      modules_[u][m].finish(solved[units_[u]->serves[m].task].record);
}

void SetRows::refine(size_t u, bool is_everywhere) {
  quant::Factor& factor = units_[u]->factor;
  if (factor.failed) return;
  const PanelLayout& layout = units_[u]->layout;
  for (RowTiles& module : modules_[u]) module.begin_refinement();
  // Modules of one unit may have groups of their own: each sees slabs that suit it.
  std::map<int64_t, std::vector<RowTiles*>> by_width;
  for (RowTiles& module : modules_[u]) by_width[module.group_width()].push_back(&module);
  for (auto& [width, modules] : by_width)
    for (int64_t pass = 0; pass <= session_.config.quantization.refinement.sweeps; ++pass)
      for (const Range& columns : quant::refinement_slabs(layout.columns, width)) {
        at::Tensor rows = share_slab(factor, layout, columns, is_everywhere, session_.world());
        const trace::Span span("refine rows");
        const quant::Slab slab(columns, std::move(rows), factor, pass > 0);
        for (RowTiles* module : modules)
          if (std::optional<quant::Refiner>& refiner = module->refiner())
            pass == 0 ? refiner->load(slab) : refiner->sweep(slab);
      }
  factor.panels.assign(factor.panels.size(), at::Tensor());
}

}  // namespace isobath::pipeline
