#include <isobath/quant/refine.hpp>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <isobath/core/error.hpp>
#include <limits>
#include <utility>

#include "column_loop.hpp"
#include "device_refiner.hpp"
#include "refine_column.hpp"
#include "tile_grids.hpp"

namespace isobath::quant {

namespace {

/// One slab of one strip: codes (as steps from the zero point), stored values and gradient transposed,
/// [width, kRowTile], so that all rows advance together in vector lanes. Missing rows are zeros.
class Work {
 public:
  Work(const Slab& slab, const Factor& factor, const GridSpec& spec)
      : slab_(slab),
        factor_(factor),
        spec_(spec),
        format_(storage_format(spec_.storage)),
        n_columns_(factor_.n_columns()),
        n_slab_(slab.columns.size()),
        width_(n_columns_ / n_groups(n_columns_, spec_)),
        is_permuted_(quant::is_permuted(factor_.order)),
        is_live_(factor_.dead.index_select(0, factor_.order.slice(0, slab.columns.begin, slab.columns.end))
                     .logical_not()
                     .to(at::kFloat)
                     .unsqueeze(1)),
        grids_(static_cast<size_t>(n_columns_ / width_)),
        values_(at::empty({n_slab_, kRowTile}, at::kFloat)),
        steps_(at::empty_like(values_)),
        gradient_(at::empty_like(values_)),
        block_gradient_(at::empty({kBlock, kRowTile}, at::kFloat)),
        changes_(at::empty({kBlock, kRowTile}, at::kFloat)) {}

  /// Codes and grids of the slab's columns.
  void read(const QuantizedMatrix& matrix, Range rows) {
    const auto* codes = matrix.codes.const_data_ptr<int8_t>();
    const auto* scale = matrix.scale.const_data_ptr<float>();
    const auto* zero = matrix.zero.const_data_ptr<int8_t>();
    const auto* is_live = is_live_.const_data_ptr<float>();
    auto* steps = steps_.mutable_data_ptr<float>();
    const int64_t groups = std::ssize(grids_);
    const Range used = groups_in_use();
    for (int64_t group = used.begin; group < used.end; ++group)
      for (int64_t row = 0; row < kRowTile; ++row) {
        const int64_t at = (rows.begin + row) * groups + group;
        grids_[static_cast<size_t>(group)].set(
            row, row < rows.size() ? RowGrid{scale[at], zero[at]} : RowGrid{}, spec_);
      }
    for (int64_t i = 0; i < n_slab_; ++i) {
      const int64_t column = original(i);
      const TileGrids& grids = grids_[static_cast<size_t>(column / width_)];
      for (int64_t row = 0; row < kRowTile; ++row)
        steps[i * kRowTile + row] = row >= rows.size() || is_live[i] == 0
                                        ? 0.0F
                                        : static_cast<float>(codes[(rows.begin + row) * n_columns_ + column] -
                                                             grids.zero[static_cast<size_t>(row)]);
      stored_values(steps + i * kRowTile, grids.scale.data(), 1, format_,
                    values_.mutable_data_ptr<float>() + i * kRowTile);
    }
  }

  void write(const QuantizedMatrix& matrix, Range rows) const {
    auto* codes = matrix.codes.mutable_data_ptr<int8_t>();
    auto* scale = matrix.scale.mutable_data_ptr<float>();
    auto* zero = matrix.zero.mutable_data_ptr<int8_t>();
    const auto* steps = steps_.const_data_ptr<float>();
    const int64_t groups = std::ssize(grids_);
    for (int64_t row = 0; row < rows.size(); ++row)
      for (int64_t i = 0; i < n_slab_; ++i) {
        const int64_t column = original(i);
        codes[(rows.begin + row) * n_columns_ + column] =
            static_cast<int8_t>(static_cast<int>(steps[i * kRowTile + row]) +
                                grids_[static_cast<size_t>(column / width_)].zero[static_cast<size_t>(row)]);
      }
    const Range moved = groups_within();
    for (int64_t group = moved.begin; group < moved.end; ++group)
      for (int64_t row = 0; row < rows.size(); ++row) {
        const int64_t at = (rows.begin + row) * groups + group;
        scale[at] = grids_[static_cast<size_t>(group)].scale[static_cast<size_t>(row)];
        zero[at] = grids_[static_cast<size_t>(group)].zero[static_cast<size_t>(row)];
      }
  }

  /// Adds what Ŵ − T in the slab's columns says to the errors of a strip.
  void add_difference(const at::Tensor& target, Range rows, at::Tensor& errors) const {
    at::Tensor wanted = target.slice(0, rows.begin, rows.end);
    wanted =
        (is_permuted_ ? wanted.index_select(1, factor_.order.slice(0, slab_.columns.begin, slab_.columns.end))
                      : wanted.slice(1, slab_.columns.begin, slab_.columns.end))
            .to(at::kFloat);
    at::Tensor difference = values_.clone();
    difference.slice(1, 0, rows.size()).sub_(wanted.t());
    add(difference.mul_(is_live_), errors);
  }

  /// Moves codes and grids; whether any moved.
  bool refine(at::Tensor& errors) {
    const at::Tensor before = values_.clone();
    at::mm_out(gradient_, slab_.rows, errors.slice(0, slab_.columns.begin));
    bool any = false;
    for (int64_t begin = 0; begin < n_slab_; begin += kBlock)
      any |= move_codes(begin, std::min(n_slab_, begin + kBlock));
    const Range movable = groups_within();
    for (int64_t group = movable.begin; group < movable.end; ++group) any |= move_grid(group);
    if (any) add(values_ - before, errors);
    return any;
  }

 private:
  [[nodiscard]] int64_t original(int64_t i) const {
    return is_permuted_ ? factor_.order.const_data_ptr<int64_t>()[slab_.columns.begin + i]
                        : slab_.columns.begin + i;
  }
  [[nodiscard]] Range groups_in_use() const {
    if (is_permuted_) return {0, std::ssize(grids_)};
    return {slab_.columns.begin / width_, (slab_.columns.end - 1) / width_ + 1};
  }
  /// Groups of which all columns are in the slab.
  [[nodiscard]] Range groups_within() const {
    if (is_permuted_) return {0, 0};
    const int64_t first = (slab_.columns.begin + width_ - 1) / width_;
    return {first, std::max(first, slab_.columns.end / width_)};
  }

  void add(const at::Tensor& difference, at::Tensor& errors) const {
    errors.slice(0, slab_.columns.begin).addmm_(slab_.rows.t(), difference);
  }

  bool move_codes(int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    at::Tensor gradient = block_gradient_.narrow(0, 0, n), changes = changes_.narrow(0, 0, n);
    gradient.copy_(gradient_.narrow(0, begin, n));
    const auto* h = slab_.curvature.const_data_ptr<float>();
    auto* gradients = gradient.mutable_data_ptr<float>();
    auto* moved = changes.mutable_data_ptr<float>();
    bool any = false;
    for (int64_t i = begin; i < end; ++i) {
      const float* h_row = h + i * n_slab_ + i;
      float* change = moved + (i - begin) * kRowTile;
      if (*h_row > 0)
        any |= refine_column(gradients + (i - begin) * kRowTile, end - i - 1, h_row,
                             grids_[static_cast<size_t>(original(i) / width_)], format_,
                             values_.mutable_data_ptr<float>() + i * kRowTile,
                             steps_.mutable_data_ptr<float>() + i * kRowTile, change);
      else
        std::fill_n(change, kRowTile, 0.0F);
    }
    if (any) gradient_.addmm_(slab_.curvature.narrow(0, begin, n).t(), changes);
    return any;
  }

  /// What a group changes to: stored values, steps and grids, and by how much the objective falls.
  struct Move {
    at::Tensor values, steps;
    std::array<RowGrid, kRowTile> grids;
    std::array<float, kRowTile> change;
  };

  /// The best scale of every row for its codes with the zero point moved by `shift`; a change of infinity
  /// where there is none.
  Move best_scales(int64_t group, int shift, const at::Tensor& curvature, const at::Tensor& wanted) const {
    const int64_t begin = group * width_ - slab_.columns.begin;
    const TileGrids& grids = grids_[static_cast<size_t>(group)];
    Move move;
    move.steps = steps_.narrow(0, begin, width_);
    if (shift != 0) move.steps = move.steps - is_live_.narrow(0, begin, width_) * shift;
    // d/ds of the objective of s·k is 0: s = kᵀ(H u − g)/(kᵀ H k), u the values now.
    std::array<float, kRowTile> cross, square, scale;
    const auto* steps = move.steps.const_data_ptr<float>();
    dot_of_rows(steps, wanted.const_data_ptr<float>(), width_, cross.data());
    dot_of_rows(steps, curvature.mm(move.steps).const_data_ptr<float>(), width_, square.data());
    for (int64_t row = 0; row < kRowTile; ++row) {
      const bool has_optimum = square[row] > 0 && cross[row] > 0;
      scale[row] = has_optimum ? storable_scale(spec_, format_, cross[row] / square[row]) : grids.scale[row];
      move.grids[row] = {scale[row], grids.zero[row] + shift};
    }
    move.values = at::empty_like(move.steps);
    stored_values(steps, scale.data(), width_, format_, move.values.mutable_data_ptr<float>());
    const at::Tensor delta = move.values - values_.narrow(0, begin, width_);
    const at::Tensor slope = gradient_.narrow(0, begin, width_) + 0.5 * curvature.mm(delta);
    dot_of_rows(delta.const_data_ptr<float>(), slope.const_data_ptr<float>(), width_, move.change.data());
    for (int64_t row = 0; row < kRowTile; ++row) {
      const int zero = move.grids[row].zero;
      if (zero < smallest_code(spec_) || zero > largest_code(spec_))
        move.change[row] = std::numeric_limits<float>::infinity();
    }
    return move;
  }

  bool move_grid(int64_t group) {
    const int64_t begin = group * width_ - slab_.columns.begin;
    const at::Tensor curvature = slab_.curvature.narrow(0, begin, width_).narrow(1, begin, width_);
    const at::Tensor old_values = values_.narrow(0, begin, width_).clone();
    const at::Tensor wanted = curvature.mm(old_values) - gradient_.narrow(0, begin, width_);
    std::vector<Move> moves{best_scales(group, 0, curvature, wanted)};
    if (!spec_.symmetric)
      for (const int shift : {-1, 1}) moves.push_back(best_scales(group, shift, curvature, wanted));
    auto* values = values_.mutable_data_ptr<float>() + begin * kRowTile;
    auto* steps = steps_.mutable_data_ptr<float>() + begin * kRowTile;
    bool any = false;
    for (int64_t row = 0; row < kRowTile; ++row) {
      const Move* best = nullptr;
      for (const Move& move : moves)
        if (move.change[row] < (best == nullptr ? 0.0F : best->change[row])) best = &move;
      if (best == nullptr) continue;
      any = true;
      grids_[static_cast<size_t>(group)].set(row, best->grids[row], spec_);
      const float* best_values = best->values.const_data_ptr<float>();
      const float* best_steps = best->steps.const_data_ptr<float>();
      for (int64_t j = 0; j < width_; ++j) {
        values[j * kRowTile + row] = best_values[j * kRowTile + row];
        steps[j * kRowTile + row] = best_steps[j * kRowTile + row];
      }
    }
    if (any)
      gradient_.addmm_(slab_.curvature.narrow(0, begin, width_).t(),
                       values_.narrow(0, begin, width_) - old_values);
    return any;
  }

  const Slab& slab_;
  const Factor& factor_;
  const GridSpec& spec_;
  StorageFormat format_;
  int64_t n_columns_, n_slab_;
  int64_t width_;  ///< columns of a group
  bool is_permuted_;
  at::Tensor is_live_;  ///< [width of the slab, 1]
  std::vector<TileGrids> grids_;
  at::Tensor values_, steps_;
  at::Tensor gradient_;                  ///< (H + λI)/mean (Ŵ−T)ᵀ of the slab's columns
  at::Tensor block_gradient_, changes_;  ///< of the columns of one block
};

}  // namespace

/// The strips of rows on the CPU.
class Refiner::Host {
 public:
  Host(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor)
      : target_(target),
        factor_(factor),
        matrix_{start.spec, start.codes.clone(at::MemoryFormat::Contiguous),
                start.scale.to(at::kFloat).clone(at::MemoryFormat::Contiguous),
                start.zero.clone(at::MemoryFormat::Contiguous)} {
    for (int64_t row = 0; row < target.size(0); row += kRowTile)
      strips_.push_back({.errors = at::zeros({target.size(1), kRowTile}, at::kFloat)});
  }

  void load(const Slab& slab) {
    for_each_strip(slab, [&](const Work& work, Strip& strip, Range rows) {
      work.add_difference(target_, rows, strip.errors);
    });
  }

  void sweep(const Slab& slab) {
    for_each_strip(slab, [&](Work& work, Strip& strip, Range rows) {
      if (work.refine(strip.errors)) {
        work.write(matrix_, rows);
        strip.has_moved = true;
      }
      if (slab.columns.end < factor_.n_columns()) return;
      strip.is_settled = !std::exchange(strip.has_moved, false);
    });
  }

  [[nodiscard]] bool is_settled() const {
    return std::all_of(strips_.begin(), strips_.end(), [](const Strip& strip) { return strip.is_settled; });
  }

  /// Σ ‖E‖²/mean of the rows of a tile, which starts a strip.
  [[nodiscard]] double squares(Range rows) const {
    double sum = 0;
    for (int64_t row = rows.begin; row < rows.end; row += kRowTile)
      sum += strips_[static_cast<size_t>(row / kRowTile)].errors.square().sum(at::kDouble).item<double>();
    return sum;
  }
  /// Scales in f32.
  [[nodiscard]] const QuantizedMatrix& matrix() const { return matrix_; }

 private:
  struct Strip {
    at::Tensor errors;  ///< [C, kRowTile] f32: Eᵀ/√mean, in the factor's column order
    bool has_moved = false, is_settled = false;
  };

  template <class Visit>
  void for_each_strip(const Slab& slab, const Visit& visit) {
    at::parallel_for(0, std::ssize(strips_), 1, [&](int64_t first, int64_t last) {
      Work work(slab, factor_, matrix_.spec);
      for (int64_t index = first; index < last; ++index) {
        Strip& strip = strips_[static_cast<size_t>(index)];
        if (strip.is_settled) continue;
        const Range rows{index * kRowTile, std::min(target_.size(0), (index + 1) * kRowTile)};
        work.read(matrix_, rows);
        visit(work, strip, rows);
      }
    });
  }

  at::Tensor target_;
  const Factor& factor_;
  QuantizedMatrix matrix_;
  std::vector<Strip> strips_;
};

Refiner::Refiner(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor)
    : target_(target), factor_(factor) {
  ISOBATH_CHECK(target.dim() == 2 && target.is_floating_point(),
                "the target of a refinement must be [R, C] floats");
  ISOBATH_CHECK(start.codes.sizes() == target.sizes(), "codes [{}, {}] for a target [{}, {}]",
                start.codes.size(0), start.codes.size(1), target.size(0), target.size(1));
  ISOBATH_CHECK(factor.n_columns() == target.size(1), "a factor of {} columns for a target of {}",
                factor.n_columns(), target.size(1));
  if (target.is_cpu())
    host_ = std::make_unique<Host>(start, target, factor);
  else
    device_ = std::make_unique<DeviceRefiner>(start, target, factor);
}
Refiner::~Refiner() = default;
Refiner::Refiner(Refiner&&) noexcept = default;

void Refiner::load(const Slab& slab) {
  device_ ? device_->load(slab) : host_->load(slab);
}
void Refiner::sweep(const Slab& slab) {
  device_ ? device_->sweep(slab) : host_->sweep(slab);
}

bool Refiner::is_settled() const {
  return device_ ? device_->is_settled() : host_->is_settled();
}

at::Tensor Refiner::objectives(int64_t tile_rows) const {
  ISOBATH_CHECK(tile_rows % kRowTile == 0, "tiles of {} rows", tile_rows);
  const int64_t n_rows = target_.size(0);
  at::Tensor values = at::zeros({(n_rows + tile_rows - 1) / tile_rows}, at::kDouble);
  QuantizedMatrix stored = matrix();
  stored.scale = stored.scale.to(stored.spec.storage);
  const auto squares_of = [&](Range rows) {
    return device_ ? device_->errors(rows).square().sum(at::kDouble).item<double>() : host_->squares(rows);
  };
  at::parallel_for(0, values.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const Range rows{tile * tile_rows, std::min(n_rows, (tile + 1) * tile_rows)};
      const QuantizedMatrix part{stored.spec, stored.codes.slice(0, rows.begin, rows.end),
                                 stored.scale.slice(0, rows.begin, rows.end),
                                 stored.zero.slice(0, rows.begin, rows.end)};
      at::Tensor difference =
          dequantize(part).to(at::kFloat) - target_.slice(0, rows.begin, rows.end).to(at::kCPU, at::kFloat);
      difference.masked_fill_(factor_.dead, 0);
      const double norm = difference.square().sum(at::kDouble).item<double>();
      values.mutable_data_ptr<double>()[tile] =
          std::max(0.0, 0.5 * factor_.mean * (squares_of(rows) - factor_.damping * norm));
    }
  });
  return values;
}

QuantizedMatrix Refiner::matrix() const {
  return device_ ? device_->matrix() : host_->matrix();
}

QuantizedMatrix Refiner::take() {
  QuantizedMatrix taken = matrix();
  taken.scale = taken.scale.to(taken.spec.storage);
  return taken;
}

QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor,
                       int64_t sweeps) {
  const int64_t group_width = factor.n_columns() / n_groups(factor.n_columns(), start.spec);
  Refiner refiner(start, target, factor);
  for (int64_t pass = 0; pass <= sweeps && !refiner.is_settled(); ++pass)
    for (const Range& columns : refinement_slabs(panels_of(factor), group_width)) {
      const Slab slab = slab_of(factor, columns, pass > 0);
      pass == 0 ? refiner.load(slab) : refiner.sweep(slab);
    }
  return refiner.take();
}

}  // namespace isobath::quant
