#include <isobath/quant/refine.hpp>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <isobath/core/error.hpp>
#include <limits>

#include "simd.hpp"
#include "tile_grids.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;

/// Columns between two updates of the whole gradient by a matrix product.
static constexpr int64_t kBlock = 128;
static constexpr int64_t kParts = kRowTile / kLanes;

/// Moves one column of a tile to its best codes and the change on to the gradients of the `n_later` columns
/// that follow it in the block. gradients [1 + n_later, kRowTile]; h_row [1 + n_later] starts at the
/// diagonal; values, steps, changes [kRowTile]. Whether any code changed.
ISOBATH_SIMD_CLONES bool refine_column(float* gradients, int64_t n_later, const float* h_row,
                                       const TileGrids& grids, StorageFormat format, float* values,
                                       float* steps, float* changes) {
  Floats moved[kParts];
  const float curvature = h_row[0], inverse_curvature = 1.0F / curvature;
  bool any = false;
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t row = part * kLanes;
    Floats gradient, value, step, scale, inverse, low, high;
    simd::load(gradient, gradients + row);
    simd::load(value, values + row);
    simd::load(step, steps + row);
    simd::load(scale, grids.scale.data() + row);
    simd::load(inverse, grids.inverse.data() + row);
    simd::load(low, grids.low.data() + row);
    simd::load(high, grids.high.data() + row);
    Floats new_step = (value - gradient * inverse_curvature) * inverse;
    simd::round_clamped(new_step, low, high);
    Floats new_value = new_step * scale;
    simd::round_stored(new_value, format);
    const Floats change = new_value - value;
    // The stored value is rounded, so the nearest code is not always an improvement.
    const auto is_better = change * (gradient + 0.5F * curvature * change) < 0.0F;
    moved[part] = is_better ? change : Floats{};
    simd::store(values + row, is_better ? new_value : value);
    simd::store(steps + row, is_better ? new_step : step);
    simd::store(changes + row, moved[part]);
    for (int64_t lane = 0; lane < kLanes; ++lane) any |= is_better[lane] != 0;
  }
  if (!any) return false;
  for (int64_t later = 1; later <= n_later; ++later) {
    float* column = gradients + later * kRowTile;
    const float factor = h_row[later];
    for (int64_t part = 0; part < kParts; ++part) {
      Floats gradient;
      simd::load(gradient, column + part * kLanes);
      gradient += moved[part] * factor;
      simd::store(column + part * kLanes, gradient);
    }
  }
  return true;
}

/// out[r] = Σ_j a[j, r]·b[j, r] over n rows of kRowTile.
ISOBATH_SIMD_CLONES void dot_of_rows(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t part = 0; part < kParts; ++part) {
    Floats sum{};
    for (int64_t j = 0; j < n; ++j) {
      Floats left, right;
      simd::load(left, a + j * kRowTile + part * kLanes);
      simd::load(right, b + j * kRowTile + part * kLanes);
      sum += left * right;
    }
    simd::store(out + part * kLanes, sum);
  }
}

/// values[j, r] = steps[j, r]·scale[r] as a loader sees it.
ISOBATH_SIMD_CLONES void stored_values(const float* steps, const float* scale, int64_t n,
                                       StorageFormat format, float* values) {
  for (int64_t part = 0; part < kParts; ++part) {
    Floats factor;
    simd::load(factor, scale + part * kLanes);
    for (int64_t j = 0; j < n; ++j) {
      Floats value;
      simd::load(value, steps + j * kRowTile + part * kLanes);
      value *= factor;
      simd::round_stored(value, format);
      simd::store(values + j * kRowTile + part * kLanes, value);
    }
  }
}

/// Where the arguments and the result of refine lie, from the first row of a tile on.
struct TileRows {
  int64_t n_rows;
  const float* target;
  int8_t* codes;
  float* scale;
  int8_t* zero;
};

/// The sweeps for up to kRowTile rows. Codes (as steps from the zero point), stored values and gradient are
/// held transposed, [C, kRowTile]: all rows advance together in vector lanes. Missing rows are zeros.
class TileRefiner {
 public:
  TileRefiner(const at::Tensor& h, const GridSpec& spec, int64_t n_columns)
      : h_(h),
        spec_(spec),
        format_(storage_format(spec.storage)),
        n_columns_(n_columns),
        width_(n_columns / n_groups(n_columns, spec)),
        is_live_(h.diagonal().gt(0).to(at::kFloat).unsqueeze(1)),
        grids_(n_columns / width_),
        target_(at::empty({n_columns, kRowTile}, at::kFloat)),
        values_(at::empty_like(target_)),
        steps_(at::empty_like(target_)),
        gradient_(at::empty_like(target_)),
        block_gradient_(at::empty({kBlock, kRowTile}, at::kFloat)),
        changes_(at::empty({kBlock, kRowTile}, at::kFloat)) {}

  void refine(const TileRows& rows, int64_t sweeps) {
    load(rows);
    at::mm_out(gradient_, h_, values_ - target_);
    for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
      bool any = false;
      for (int64_t begin = 0; begin < n_columns_; begin += kBlock)
        any |= move_codes(begin, std::min(n_columns_, begin + kBlock));
      for (int64_t group = 0; group < std::ssize(grids_); ++group) any |= move_grid(group);
      if (!any) break;
    }
    store(rows);
  }

 private:
  void load(const TileRows& rows) {
    auto* target = target_.mutable_data_ptr<float>();
    auto* steps = steps_.mutable_data_ptr<float>();
    const auto* is_live = is_live_.const_data_ptr<float>();
    const int64_t groups = std::ssize(grids_);
    for (int64_t row = 0; row < kRowTile; ++row) {
      const bool is_missing = row >= rows.n_rows;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t at = row * groups + group;
        grids_[group].set(row, is_missing ? RowGrid{} : RowGrid{rows.scale[at], rows.zero[at]}, spec_);
      }
      for (int64_t i = 0; i < n_columns_; ++i) {
        const bool is_zero = is_missing || is_live[i] == 0;
        const int64_t at = row * n_columns_ + i;
        target[i * kRowTile + row] = is_zero ? 0.0F : rows.target[at];
        steps[i * kRowTile + row] =
            is_zero ? 0.0F : static_cast<float>(rows.codes[at] - grids_[i / width_].zero[row]);
      }
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t at = group * width_ * kRowTile;
      stored_values(steps + at, grids_[group].scale.data(), width_, format_,
                    values_.mutable_data_ptr<float>() + at);
    }
  }

  void store(const TileRows& rows) const {
    const auto* steps = steps_.const_data_ptr<float>();
    const int64_t groups = std::ssize(grids_);
    for (int64_t row = 0; row < rows.n_rows; ++row) {
      for (int64_t i = 0; i < n_columns_; ++i)
        rows.codes[row * n_columns_ + i] =
            static_cast<int8_t>(static_cast<int>(steps[i * kRowTile + row]) + grids_[i / width_].zero[row]);
      for (int64_t group = 0; group < groups; ++group) {
        rows.scale[row * groups + group] = grids_[group].scale[row];
        rows.zero[row * groups + group] = grids_[group].zero[row];
      }
    }
  }

  bool move_codes(int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    at::Tensor gradient = block_gradient_.narrow(0, 0, n), changes = changes_.narrow(0, 0, n);
    gradient.copy_(gradient_.narrow(0, begin, n));
    const auto* h = h_.const_data_ptr<float>();
    auto* gradients = gradient.mutable_data_ptr<float>();
    auto* moved = changes.mutable_data_ptr<float>();
    bool any = false;
    for (int64_t i = begin; i < end; ++i) {
      const float* h_row = h + i * n_columns_ + i;
      float* change = moved + (i - begin) * kRowTile;
      if (*h_row > 0)
        any |= refine_column(gradients + (i - begin) * kRowTile, end - i - 1, h_row, grids_[i / width_],
                             format_, values_.mutable_data_ptr<float>() + i * kRowTile,
                             steps_.mutable_data_ptr<float>() + i * kRowTile, change);
      else
        std::fill_n(change, kRowTile, 0.0F);
    }
    if (any) gradient_.addmm_(h_.narrow(0, begin, n).t(), changes);
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
    const int64_t begin = group * width_;
    const TileGrids& grids = grids_[group];
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
    const int64_t begin = group * width_;
    const at::Tensor curvature = h_.narrow(0, begin, width_).narrow(1, begin, width_);
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
      grids_[group].set(row, best->grids[row], spec_);
      for (int64_t j = 0; j < width_; ++j) {
        values[j * kRowTile + row] = best->values.const_data_ptr<float>()[j * kRowTile + row];
        steps[j * kRowTile + row] = best->steps.const_data_ptr<float>()[j * kRowTile + row];
      }
    }
    if (any) gradient_.addmm_(h_.narrow(0, begin, width_).t(), values_.narrow(0, begin, width_) - old_values);
    return any;
  }

  const at::Tensor& h_;
  const GridSpec& spec_;
  StorageFormat format_;
  int64_t n_columns_;
  int64_t width_;  ///< columns of a group
  at::Tensor is_live_;
  std::vector<TileGrids> grids_;
  at::Tensor target_, values_, steps_;
  at::Tensor gradient_;                  ///< H (Ŵ−T)ᵀ
  at::Tensor block_gradient_, changes_;  ///< of the columns of one block
};

at::Tensor damped_hessian(const at::Tensor& h, double damping) {
  const at::Tensor diagonal = h.diagonal().to(at::kDouble);
  const at::Tensor is_live = diagonal > 0;
  const auto n_live = is_live.sum().item<int64_t>();
  if (n_live == 0) return at::zeros_like(h);
  const double mean = diagonal.sum().item<double>() / static_cast<double>(n_live);
  at::Tensor damped = h.to(at::kDouble) / mean;
  damped.diagonal().add_(is_live.to(at::kDouble), damping);
  return damped.masked_fill_(is_live.logical_not().unsqueeze(0), 0)
      .masked_fill_(is_live.logical_not().unsqueeze(1), 0)
      .to(at::kFloat)
      .contiguous();
}

QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target, const at::Tensor& h,
                       int64_t sweeps) {
  ISOBATH_CHECK(target.dim() == 2 && target.scalar_type() == at::kFloat && target.is_cpu(),
                "the target of refine must be [R, C] f32 on the CPU");
  const int64_t n_rows = target.size(0), n_columns = target.size(1);
  ISOBATH_CHECK(start.codes.sizes() == target.sizes(), "codes [{}, {}] for a target [{}, {}]",
                start.codes.size(0), start.codes.size(1), n_rows, n_columns);
  ISOBATH_CHECK(
      h.size(0) == n_columns && h.size(1) == n_columns && h.scalar_type() == at::kFloat && h.is_contiguous(),
      "refine needs H of {} columns, contiguous f32", n_columns);
  const at::Tensor weights = target.contiguous();
  QuantizedMatrix matrix{start.spec, start.codes.clone(at::MemoryFormat::Contiguous),
                         start.scale.to(at::kFloat).clone(at::MemoryFormat::Contiguous),
                         start.zero.clone(at::MemoryFormat::Contiguous)};
  const int64_t groups = matrix.scale.size(1), n_tiles = (n_rows + kRowTile - 1) / kRowTile;
  const float* from = weights.const_data_ptr<float>();
  auto* codes = matrix.codes.mutable_data_ptr<int8_t>();
  auto* scale = matrix.scale.mutable_data_ptr<float>();
  auto* zero = matrix.zero.mutable_data_ptr<int8_t>();
  at::parallel_for(0, n_tiles, 1, [&](int64_t first, int64_t last) {
    TileRefiner refiner(h, matrix.spec, n_columns);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t row = tile * kRowTile;
      refiner.refine({std::min(kRowTile, n_rows - row), from + row * n_columns, codes + row * n_columns,
                      scale + row * groups, zero + row * groups},
                     sweeps);
    }
  });
  matrix.scale = matrix.scale.to(matrix.spec.storage);
  return matrix;
}

}  // namespace isobath::quant
