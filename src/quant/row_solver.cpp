#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/quant/row_solver.hpp>
#include <isobath/quant/solver.hpp>

#include "column_block.hpp"
#include "column_loop.hpp"
#include "device_loop.hpp"
#include "feedback_product.hpp"

namespace isobath::quant {

int64_t tile_rows(int64_t n_rows) {
  constexpr int64_t kTiles = 64, kMostStrips = 4;
  return kRowTile * std::clamp<int64_t>(n_rows / (kTiles * kRowTile), 1, kMostStrips);
}

class RowSolver::Loop {
 public:
  Loop(const at::Tensor& w, const Factor& factor, const GridSpec& spec, int64_t tile_rows)
      : factor_(factor),
        spec_(spec),
        n_rows_(w.size(0)),
        n_columns_(w.size(1)),
        width_(n_columns_ / n_groups(n_columns_, spec)),
        tile_rows_(tile_rows),
        order_(factor.order.const_data_ptr<int64_t>()),
        is_permuted_(quant::is_permuted(factor.order)),
        blocks_{n_columns_, width_, is_permuted_},
        has_dead_(factor.dead.any().item<bool>()),
        largest_curvature_(factor.curvature.max().item<double>()),
        matrix_{spec, at::empty({n_rows_, n_columns_}, at::kChar),
                at::empty({n_rows_, n_columns_ / width_}, at::kFloat),
                at::zeros({n_rows_, n_columns_ / width_}, at::kChar)} {
    ISOBATH_CHECK(factor.n_columns() == n_columns_, "factor of {} columns for a weight of {}",
                  factor.n_columns(), n_columns_);
    ISOBATH_CHECK(tile_rows > 0 && tile_rows % kRowTile == 0, "tiles of {} rows", tile_rows);
    const at::Tensor curvature = remaining_curvature(factor);
    for (int64_t group = 0; group < n_columns_; group += width_)
      fitters_.emplace_back(
          spec, width_, std::span(curvature.const_data_ptr<float>() + group, static_cast<size_t>(width_)));
    for (int64_t row = 0; row < n_rows_; row += tile_rows) tiles_.emplace_back(row, w, *this);
    if (!is_permuted_) return;
    at::parallel_for(0, std::ssize(tiles_), 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) fit_original(tiles_[static_cast<size_t>(t)], w);
    });
  }

  void advance(const at::Tensor& panel) {
    panels_.push(panel);
    while (next_ < n_columns_) {
      const int64_t end = blocks_.end_of(next_);
      // A wide group is fitted on the current values of all its columns.
      const int64_t needed = blocks_.starts_wide_group(next_) && next_ > 0 ? next_ + width_ : end;
      if (needed > panels_.end()) break;
      solve_block({next_, end});
      next_ = end;
    }
    panels_.drop_before(next_);
  }

  QuantizedMatrix take() {
    ISOBATH_CHECK(next_ == n_columns_, "{} of {} columns are solved", next_, n_columns_);
    const int64_t groups = n_columns_ / width_;
    auto* scale = matrix_.scale.mutable_data_ptr<float>();
    auto* zero = matrix_.zero.mutable_data_ptr<int8_t>();
    for (const Tile& tile : tiles_)
      for (int64_t i = 0; i < tile.n_rows; ++i)
        for (int64_t group = 0; group < groups; ++group) {
          const TileGrids& grids = tile.grids[static_cast<size_t>(i / kRowTile * groups + group)];
          const int64_t at = (tile.first_row + i) * groups + group;
          scale[at] = grids.scale[static_cast<size_t>(i % kRowTile)];
          zero[at] = grids.zero[static_cast<size_t>(i % kRowTile)];
        }
    matrix_.scale = matrix_.scale.to(spec_.storage);
    return std::move(matrix_);
  }

  [[nodiscard]] at::Tensor objectives() const {
    at::Tensor values = at::zeros({std::ssize(tiles_)}, at::kDouble);
    const double added = factor_.damping * factor_.mean;
    for (size_t t = 0; t < tiles_.size(); ++t) {
      const double norm = tiles_[t].errors.square().sum(at::kDouble).item<double>();
      values[static_cast<int64_t>(t)] =
          std::max(0.0, 0.5 * (largest_curvature_ * tiles_[t].squares - added * norm));
    }
    return values;
  }

 private:
  /// Rows held transposed, in the order of the columns. Missing rows are zeros, so that every tile runs the
  /// same operations on the same shapes.
  struct Tile {
    Tile(int64_t first_row, const at::Tensor& w, const Loop& loop)
        : first_row(first_row),
          n_rows(std::min(loop.tile_rows_, w.size(0) - first_row)),
          errors(at::empty({w.size(1), loop.tile_rows_}, at::kFloat)),
          grids(static_cast<size_t>(loop.tile_rows_ / kRowTile * (loop.n_columns_ / loop.width_))) {
      const at::Tensor rows = w.slice(0, first_row, first_row + n_rows).to(at::kFloat);
      check_weights(rows, first_row);
      errors.slice(1, 0, n_rows)
          .copy_(loop.is_permuted_ ? rows.index_select(1, loop.factor_.order).t() : rows.t());
      errors.slice(1, n_rows).zero_();
      if (loop.has_dead_)
        errors.masked_fill_(loop.factor_.dead.index_select(0, loop.factor_.order).unsqueeze(1), 0);
    }
    int64_t first_row, n_rows;
    at::Tensor errors;             ///< [C, tile_rows]: w − ŵ of solved columns, w of the others
    at::Tensor wide;               ///< [width, tile_rows]: a wide group's columns when the loop reached it
    std::vector<TileGrids> grids;  ///< [strips of kRowTile rows, groups]
    double squares = 0;            ///< Σ (R_kk² / largest) (target_k − ŵ_k)²
  };

  [[nodiscard]] BlockFeedback feedback_within(Range block) const {
    BlockFeedback feedback;
    panels_.for_each_in(block, [&](Range part, const at::Tensor& columns) {
      const at::Tensor own = columns.slice(0, block.begin, part.end).contiguous();
      const auto* from = own.const_data_ptr<float>();
      float* to = feedback.rows.data() + (part.begin - block.begin) * kBlock;
      // Few columns at a time: each is a cache line of its own.
      constexpr int64_t kColumns = 16;
      for (int64_t first = 0; first < part.size(); first += kColumns)
        for (int64_t i = 0; i < own.size(0); ++i)
          for (int64_t k = first; k < std::min(first + kColumns, part.size()); ++k)
            to[k * kBlock + i] = from[i * part.size() + k];
    });
    return feedback;
  }

  void solve_block(Range block) {
    const int64_t n = block.size();
    BlockFeedback feedback = feedback_within(block);
    const auto* curvature = factor_.curvature.const_data_ptr<double>() + block.begin;
    for (int64_t k = 0; k < n; ++k)
      feedback.curvature[static_cast<size_t>(k)] = static_cast<float>(curvature[k] / largest_curvature_);
    const FeedbackColumns before = packed(block);
    at::parallel_for(0, std::ssize(tiles_), 1, [&](int64_t first, int64_t last) {
      const auto work = std::make_unique_for_overwrite<ColumnBlock>();
      for (int64_t t = first; t < last; ++t) {
        Tile& tile = tiles_[static_cast<size_t>(t)];
        if (blocks_.starts_wide_group(block.begin)) enter_wide_group(tile, block.begin, *work);
        const at::Tensor targets = current(tile, block, before);
        for (int64_t row = 0; row < tile_rows_; row += kRowTile)
          solve_strip(tile, row, block, targets, feedback, *work);
      }
    });
  }

  void enter_wide_group(Tile& tile, int64_t begin, ColumnBlock& work) {
    // Nothing precedes the first group: its columns are the weights themselves.
    tile.wide = begin == 0 ? at::Tensor() : with_feedback(tile, {begin, begin + width_}, {0, begin});
    const at::Tensor columns =
        begin == 0 ? tile.errors.slice(0, 0, width_) : settled_group(tile, begin, work);
    for (int64_t row = 0; row < tile_rows_; row += kRowTile)
      fit(tile, row, begin / width_, columns.const_data_ptr<float>() + row, tile_rows_);
  }

  /// A wide group settled block by block, [width, tile_rows].
  at::Tensor settled_group(const Tile& tile, int64_t begin, ColumnBlock& work) const {
    at::Tensor settled = at::empty_like(tile.wide), shifts = at::empty_like(tile.wide);
    const Range group{begin, begin + width_};
    for (int64_t first = begin; first < group.end; first += kBlock) {
      const Range block{first, std::min(first + kBlock, group.end)};
      const BlockFeedback feedback = feedback_within(block);
      at::Tensor targets = tile.wide.slice(0, block.begin - begin, block.end - begin).clone();
      if (first > begin) add_products(shifts.slice(0, 0, first - begin), {begin, first}, block, targets);
      for (int64_t row = 0; row < tile_rows_; row += kRowTile) {
        load_strip(targets, 0, row, block.size(), work.targets);
        load_strip(tile.errors, block.begin, row, block.size(), work.errors);
        settle_columns(work, {0, block.size()}, feedback);
        store_strip(work.settled, block.size(), settled, first - begin, row);
        store_strip(work.shifts, block.size(), shifts, first - begin, row);
      }
    }
    return settled;
  }

  /// The rows [row, row + kRowTile) of n columns from `first` on.
  template <class Columns>
  static void load_strip(const at::Tensor& from, int64_t first, int64_t row, int64_t n, Columns& columns) {
    const auto* at = from.const_data_ptr<float>() + first * from.size(1) + row;
    for (int64_t k = 0; k < n; ++k)
      std::copy_n(at + k * from.size(1), kRowTile, columns.data() + k * kRowTile);
  }
  template <class Columns>
  static void store_strip(const Columns& columns, int64_t n, at::Tensor& to, int64_t first, int64_t row) {
    auto* at = to.mutable_data_ptr<float>() + first * to.size(1) + row;
    for (int64_t k = 0; k < n; ++k) std::copy_n(columns.data() + k * kRowTile, kRowTile, at + k * to.size(1));
  }

  /// The columns whose errors are not yet in the targets of a block before its first column.
  [[nodiscard]] Range pending(Range block) const {
    return {is_permuted_ || width_ <= kBlock ? 0 : block.begin / width_ * width_, block.begin};
  }

  /// What the columns that are pending feed to a block, packed once for all tiles.
  [[nodiscard]] FeedbackColumns packed(Range block) const {
    constexpr int64_t kSourcesAtOnce = 512;
    const Range from = pending(block);
    FeedbackColumns columns(from.size(), block.size());
    panels_.for_each_in(block, [&](Range part, const at::Tensor& panel) {
      const auto* values = panel.const_data_ptr<float>() + from.begin * panel.stride(0);
      at::parallel_for(0, from.size(), kSourcesAtOnce, [&](int64_t begin, int64_t end) {
        columns.pack(values, panel.stride(0), {begin, end},
                     {part.begin - block.begin, part.end - block.begin});
      });
    });
    return columns;
  }

  /// The targets of a block, with the errors of all columns before it. [n, tile_rows].
  at::Tensor current(const Tile& tile, Range block, const FeedbackColumns& before) const {
    const Range from = pending(block);
    const at::Tensor& whole = tile.wide.defined() ? tile.wide : tile.errors;
    const int64_t first = tile.wide.defined() ? from.begin : 0;
    at::Tensor targets = whole.slice(0, block.begin - first, block.end - first).clone();
    before.add_product(tile.errors.const_data_ptr<float>() + from.begin * tile_rows_, tile_rows_,
                       targets.mutable_data_ptr<float>());
    return targets;
  }

  at::Tensor with_feedback(const Tile& tile, Range columns, Range from) const {
    at::Tensor targets = tile.errors.slice(0, columns.begin, columns.end).clone();
    add_products(tile.errors.slice(0, from.begin, from.end), from, columns, targets);
    return targets;
  }

  /// targets [columns, tile_rows] += (R diag(R)⁻¹)ᵀ errors, errors [from, tile_rows].
  void add_products(const at::Tensor& errors, Range from, Range columns, at::Tensor& targets) const {
    panels_.for_each_in(columns, [&](Range part, const at::Tensor& panel) {
      targets.slice(0, part.begin - columns.begin, part.end - columns.begin)
          .addmm_(panel.slice(0, from.begin, from.end).t(), errors);
    });
  }

  void solve_strip(Tile& tile, int64_t row, Range block, const at::Tensor& targets,
                   const BlockFeedback& feedback, ColumnBlock& work) {
    const int64_t n = block.size();
    load_strip(targets, 0, row, n, work.targets);
    load_strip(tile.errors, block.begin, row, n, work.errors);
    work.squares.fill(0);
    const TileGrids* strip = tile.grids.data() + row / kRowTile * (n_columns_ / width_);
    std::array<const TileGrids*, kBlock> grids;
    for (int64_t k = 0; k < n; ++k) grids[static_cast<size_t>(k)] = strip + order_[block.begin + k] / width_;
    const bool fits_here = !is_permuted_ && width_ <= kBlock;
    for (int64_t begin = 0; begin < n;) {
      const Range columns{begin, std::min(n, begin + (fits_here ? width_ : kStep))};
      feed_forward(work, {0, begin}, columns, feedback);
      if (fits_here) {
        settle_columns(work, columns, feedback);
        fit(tile, row, (block.begin + begin) / width_, work.settled.data() + begin * kRowTile, kRowTile);
      }
      solve_columns(work, columns, feedback, grids.data(), spec_);
      begin = columns.end;
    }
    store_strip(work.errors, n, tile.errors, block.begin, row);
    for (const float part : work.squares) tile.squares += part;
    store_codes(work, block, tile.first_row + row, std::min(kRowTile, tile.n_rows - row));
  }

  void store_codes(const ColumnBlock& work, Range block, int64_t first_row, int64_t n_rows) {
    if (n_rows <= 0) return;
    auto* codes = matrix_.codes.mutable_data_ptr<int8_t>() + first_row * n_columns_;
    if (!is_permuted_) {
      take_codes(work, block.size(), n_rows, codes + block.begin, n_columns_);
      return;
    }
    std::array<int8_t, ColumnBlock::kSize> in_order;
    take_codes(work, block.size(), n_rows, in_order.data(), kBlock);
    for (int64_t i = 0; i < n_rows; ++i)
      for (int64_t k = 0; k < block.size(); ++k)
        codes[i * n_columns_ + order_[block.begin + k]] = in_order[static_cast<size_t>(i * kBlock + k)];
  }

  void fit_original(Tile& tile, const at::Tensor& w) const {
    const at::Tensor rows = w.slice(0, tile.first_row, tile.first_row + tile.n_rows).to(at::kFloat);
    at::Tensor columns = at::zeros({n_columns_, tile_rows_}, at::kFloat);
    columns.slice(1, 0, tile.n_rows).copy_(rows.t());
    if (has_dead_) columns.masked_fill_(factor_.dead.unsqueeze(1), 0);
    const auto* from = columns.const_data_ptr<float>();
    for (int64_t row = 0; row < tile_rows_; row += kRowTile)
      for (int64_t group = 0; group < n_columns_ / width_; ++group)
        fit(tile, row, group, from + group * width_ * tile_rows_ + row, tile_rows_);
  }

  /// Grids of a group for the rows [row, row + kRowTile) of a tile: columns[k · stride + row].
  void fit(Tile& tile, int64_t row, int64_t group, const float* columns, int64_t stride) const {
    TileGrids& grids = tile.grids[static_cast<size_t>(row / kRowTile * (n_columns_ / width_) + group)];
    std::array<RowGrid, kFitLanes> fitted;
    for (int64_t part = 0; part < kRowTile; part += kFitLanes) {
      fitters_[static_cast<size_t>(group)].fit(columns + part, stride, fitted.data());
      for (int64_t lane = 0; lane < kFitLanes; ++lane)
        grids.set(part + lane, fitted[static_cast<size_t>(lane)], spec_);
    }
  }

  const Factor& factor_;
  GridSpec spec_;
  int64_t n_rows_, n_columns_;
  int64_t width_;  ///< columns of a group
  int64_t tile_rows_;
  const int64_t* order_;
  bool is_permuted_;
  ColumnBlocks blocks_;
  bool has_dead_;
  std::vector<GroupFitter> fitters_;  ///< of the groups
  double largest_curvature_;
  QuantizedMatrix matrix_;
  std::vector<Tile> tiles_;
  Panels panels_;
  int64_t next_ = 0;  ///< first column that is not solved
};

RowSolver::RowSolver(const at::Tensor& w, const Factor& factor, const GridSpec& spec, int64_t tile_rows) {
  ISOBATH_CHECK(w.dim() == 2, "w must be [R, C]");
  ISOBATH_CHECK(!factor.failed, "the column loop needs a factorization that succeeded");
  if (w.is_cpu())
    loop_ = std::make_unique<Loop>(w, factor, spec, tile_rows);
  else
    device_loop_ = std::make_unique<DeviceLoop>(w, factor, spec, tile_rows);
}
RowSolver::~RowSolver() = default;
RowSolver::RowSolver(RowSolver&&) noexcept = default;

void RowSolver::advance(const at::Tensor& panel) {
  device_loop_ ? device_loop_->advance(panel) : loop_->advance(panel);
}
QuantizedMatrix RowSolver::take() {
  return device_loop_ ? device_loop_->take() : loop_->take();
}
at::Tensor RowSolver::objectives() const {
  return device_loop_ ? device_loop_->objectives() : loop_->objectives();
}

}  // namespace isobath::quant
