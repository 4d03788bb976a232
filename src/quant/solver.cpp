#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <isobath/core/error.hpp>
#include <isobath/quant/solver.hpp>

#include "simd.hpp"
#include "tile_grids.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;

/// Columns between two updates of all later columns by a matrix product.
static constexpr int64_t kBlock = 128;
static_assert(kRowTile % kLanes == 0);

/// Rounds one column of a tile and moves its error to the `n_later` columns that follow it in the block.
/// columns [1 + n_later, kRowTile]; upper_row [1 + n_later] starts at the diagonal; error, codes [kRowTile].
ISOBATH_SIMD_CLONES void solve_column(float* columns, int64_t n_later, const float* upper_row,
                                      const TileGrids& grids, StorageFormat format, float* error,
                                      int8_t* codes) {
  constexpr int64_t kParts = kRowTile / kLanes;
  Floats errors[kParts];
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t row = part * kLanes;
    Floats w, scale, inverse, low, high;
    simd::load(w, columns + row);
    simd::load(scale, grids.scale.data() + row);
    simd::load(inverse, grids.inverse.data() + row);
    simd::load(low, grids.low.data() + row);
    simd::load(high, grids.high.data() + row);
    Floats steps = w * inverse;
    simd::round_clamped(steps, low, high);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      codes[row + lane] = static_cast<int8_t>(static_cast<int>(steps[lane]) + grids.zero[row + lane]);
    }
    // The error fed back is that of the weight a loader will see.
    Floats stored = steps * scale;
    simd::round_stored(stored, format);
    errors[part] = (w - stored) / upper_row[0];
    simd::store(error + row, errors[part]);
  }
  for (int64_t later = 1; later <= n_later; ++later) {
    float* column = columns + later * kRowTile;
    const float factor = upper_row[later];
    for (int64_t part = 0; part < kParts; ++part) {
      Floats w;
      simd::load(w, column + part * kLanes);
      w -= errors[part] * factor;
      simd::store(column + part * kLanes, w);
    }
  }
}

static void check_weights(const at::Tensor& w) {
  ISOBATH_CHECK(w.dim() == 2 && w.scalar_type() == at::kFloat && w.is_cpu(),
                "w must be [R, C] f32 on the CPU");
  const at::Tensor bad = at::isfinite(w).logical_not();
  if (!bad.any().item<bool>()) return;
  const at::Tensor first = bad.nonzero()[0];
  fail<NumericError>(
      "the weight is not finite at row {}, column {}; the checkpoint is damaged or a correction overflowed",
      first[0].item<int64_t>(), first[1].item<int64_t>());
}

static QuantizedMatrix empty_matrix(int64_t n_rows, int64_t n_columns, const GridSpec& spec) {
  const int64_t groups = n_groups(n_columns, spec);
  return {spec, at::empty({n_rows, n_columns}, at::kChar), at::empty({n_rows, groups}, at::kFloat),
          at::zeros({n_rows, groups}, at::kChar)};
}

static std::span<const float> part_of(const at::Tensor& values, int64_t begin, int64_t n) {
  return {values.const_data_ptr<float>() + begin, static_cast<size_t>(n)};
}

QuantizedMatrix round_to_nearest(const at::Tensor& w, const at::Tensor& importance, const GridSpec& spec) {
  check_weights(w);
  const int64_t n_rows = w.size(0), n_columns = w.size(1);
  QuantizedMatrix matrix = empty_matrix(n_rows, n_columns, spec);
  const int64_t groups = matrix.scale.size(1), width = n_columns / groups;
  const at::Tensor weights = w.contiguous();
  at::Tensor column_importance;
  if (importance.defined()) {
    ISOBATH_CHECK(importance.numel() == n_columns, "{} importances for {} columns", importance.numel(),
                  n_columns);
    column_importance = importance.to(at::kFloat).contiguous();
  }
  const float* from = weights.const_data_ptr<float>();
  auto* codes = matrix.codes.mutable_data_ptr<int8_t>();
  auto* scale = matrix.scale.mutable_data_ptr<float>();
  auto* zero = matrix.zero.mutable_data_ptr<int8_t>();
  at::parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch;
    for (int64_t group = first; group < last; ++group) {
      GroupFitter fitter(spec, width,
                         column_importance.defined() ? part_of(column_importance, group * width, width)
                                                     : std::span<const float>());
      fit_rows(fitter, from + group * width, n_columns, n_rows, width, scratch,
               [&](int64_t row, const RowGrid& grid) {
                 const int64_t at = row * n_columns + group * width;
                 encode_row(spec, grid, from + at, width, codes + at);
                 scale[row * groups + group] = grid.scale;
                 zero[row * groups + group] = static_cast<int8_t>(grid.zero);
               });
    }
  });
  matrix.scale = matrix.scale.to(spec.storage);
  return matrix;
}

/// h_j of the grid fit: 1/U_jj², the curvature of column j that remains when all later columns compensate.
/// The objective the loop reaches is ½ Σ_j (w_j − ŵ_j)²/U_jj² over current weights, so this and not H_jj is
/// what a grid should minimise (3 bits, SmolLM2: 1 to 7 % lower objective than H_jj, 1 to 12 % with
/// act-order). [C] f32, original order, at most 1.
static at::Tensor remaining_curvature(const Factor& factor) {
  const at::Tensor diagonal = factor.upper.diagonal().to(at::kDouble);
  at::Tensor curvature = at::empty_like(diagonal);
  curvature.index_copy_(0, factor.order, (diagonal.min() / diagonal).square());
  return curvature.to(at::kFloat);
}

/// The column loop for up to kRowTile rows. The tile is held transposed, [C, kRowTile] in the order of the
/// columns: a column of the paper is contiguous, and all rows advance together in vector lanes. Missing rows
/// are zeros, so that every tile runs the same operations on the same shapes.
class TileSolver {
 public:
  TileSolver(const Factor& factor, const GridSpec& spec, int64_t n_columns)
      : factor_(factor),
        spec_(spec),
        format_(storage_format(spec.storage)),
        n_columns_(n_columns),
        width_(n_columns / n_groups(n_columns, spec)),
        order_(factor.order.const_data_ptr<int64_t>()),
        curvature_(remaining_curvature(factor)),
        grids_(n_columns / width_),
        tile_(at::zeros({n_columns, kRowTile}, at::kFloat)),
        errors_(at::zeros({kBlock, kRowTile}, at::kFloat)),
        codes_(n_columns * kRowTile),
        group_columns_(static_cast<size_t>(width_ * kRowTile)) {
    for (int64_t i = 0; i < n_columns && !is_permuted_; ++i) is_permuted_ = order_[i] != i;
  }

  void solve(const float* weights, int64_t n_rows) {
    load(weights, n_rows);
    if (is_permuted_) {
      for (int64_t group = 0; group < std::ssize(grids_); ++group) fit_original(group, weights, n_rows);
    }
    for (int64_t begin = 0; begin < n_columns_;) {
      const int64_t end = block_end(begin);
      solve_block(begin, end);
      if (end < n_columns_) update_later_columns(begin, end);
      begin = end;
    }
  }

  void store(int64_t n_rows, int8_t* codes, float* scale, int8_t* zero) const {
    const int64_t groups = std::ssize(grids_);
    for (int64_t row = 0; row < n_rows; ++row) {
      for (int64_t i = 0; i < n_columns_; ++i)
        codes[row * n_columns_ + order_[i]] = codes_[i * kRowTile + row];
      for (int64_t group = 0; group < groups; ++group) {
        scale[row * groups + group] = grids_[group].scale[row];
        zero[row * groups + group] = grids_[group].zero[row];
      }
    }
  }

 private:
  void load(const float* weights, int64_t n_rows) {
    auto* tile = tile_.mutable_data_ptr<float>();
    const bool* dead = factor_.dead.const_data_ptr<bool>();
    for (int64_t i = 0; i < n_columns_; ++i) {
      const int64_t column = order_[i];
      for (int64_t row = 0; row < kRowTile; ++row) {
        const bool is_zero = row >= n_rows || dead[column];
        tile[i * kRowTile + row] = is_zero ? 0.0F : weights[row * n_columns_ + column];
      }
    }
  }

  /// Blocks hold whole groups, or lie inside one: when the loop reaches a group, nothing is pending for its
  /// columns.
  int64_t block_end(int64_t begin) const {
    if (is_permuted_) return std::min(n_columns_, begin + kBlock);
    if (width_ <= kBlock) return std::min(n_columns_, begin + kBlock / width_ * width_);
    return std::min(begin + kBlock, (begin / width_ + 1) * width_);
  }

  void solve_block(int64_t begin, int64_t end) {
    auto* tile = tile_.mutable_data_ptr<float>();
    auto* errors = errors_.mutable_data_ptr<float>();
    const auto* upper = factor_.upper.const_data_ptr<float>();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = order_[i] / width_;
      if (!is_permuted_ && i % width_ == 0) fit_current(group);
      solve_column(tile + i * kRowTile, end - i - 1, upper + i * n_columns_ + i, grids_[group], format_,
                   errors + (i - begin) * kRowTile, codes_.data() + i * kRowTile);
    }
  }

  void update_later_columns(int64_t begin, int64_t end) {
    const int64_t n = end - begin, n_later = n_columns_ - end;
    const at::Tensor upper = factor_.upper.narrow(0, begin, n).narrow(1, end, n_later);
    tile_.narrow(0, end, n_later).addmm_(upper.t(), errors_.narrow(0, 0, n), 1, -1);
  }

  void fit_current(int64_t group) { fit(group, tile_.const_data_ptr<float>() + group * width_ * kRowTile); }

  void fit_original(int64_t group, const float* weights, int64_t n_rows) {
    const bool* dead = factor_.dead.const_data_ptr<bool>() + group * width_;
    for (int64_t j = 0; j < width_; ++j)
      for (int64_t row = 0; row < kRowTile; ++row) {
        const bool is_zero = row >= n_rows || dead[j];
        group_columns_[j * kRowTile + row] = is_zero ? 0.0F : weights[row * n_columns_ + group * width_ + j];
      }
    fit(group, group_columns_.data());
  }

  /// columns [width, kRowTile].
  void fit(int64_t group, const float* columns) {
    GroupFitter fitter(spec_, width_, part_of(curvature_, group * width_, width_));
    std::array<RowGrid, kLanes> grids;
    for (int64_t part = 0; part < kRowTile; part += kLanes) {
      fitter.fit(columns + part, kRowTile, grids.data());
      for (int64_t lane = 0; lane < kLanes; ++lane) grids_[group].set(part + lane, grids[lane], spec_);
    }
  }

  const Factor& factor_;
  const GridSpec& spec_;
  StorageFormat format_;
  int64_t n_columns_;
  int64_t width_;  ///< columns of a group
  const int64_t* order_;
  bool is_permuted_ = false;
  at::Tensor curvature_;
  std::vector<TileGrids> grids_;
  at::Tensor tile_, errors_;
  std::vector<int8_t> codes_;
  std::vector<float> group_columns_;  ///< original weights of a group, when the order is permuted
};

QuantizedMatrix gptq(const at::Tensor& w, const Factor& factor, const GridSpec& spec) {
  check_weights(w);
  const int64_t n_rows = w.size(0), n_columns = w.size(1);
  ISOBATH_CHECK(!factor.failed && factor.upper.defined(), "gptq needs a factorization that succeeded");
  ISOBATH_CHECK(factor.upper.size(0) == n_columns, "factor of {} columns for a weight of {}",
                factor.upper.size(0), n_columns);
  QuantizedMatrix matrix = empty_matrix(n_rows, n_columns, spec);
  const int64_t groups = matrix.scale.size(1), n_tiles = (n_rows + kRowTile - 1) / kRowTile;
  const at::Tensor weights = w.contiguous();
  const float* from = weights.const_data_ptr<float>();
  auto* codes = matrix.codes.mutable_data_ptr<int8_t>();
  auto* scale = matrix.scale.mutable_data_ptr<float>();
  auto* zero = matrix.zero.mutable_data_ptr<int8_t>();
  at::parallel_for(0, n_tiles, 1, [&](int64_t first, int64_t last) {
    TileSolver solver(factor, spec, n_columns);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t row = tile * kRowTile, n = std::min(kRowTile, n_rows - row);
      solver.solve(from + row * n_columns, n);
      solver.store(n, codes + row * n_columns, scale + row * groups, zero + row * groups);
    }
  });
  matrix.scale = matrix.scale.to(spec.storage);
  return matrix;
}

double objective(const at::Tensor& w, const at::Tensor& w_hat, const at::Tensor& h) {
  const at::Tensor difference = w_hat.to(at::kFloat) - w.to(at::kFloat);
  return 0.5 * (difference.mm(h.to(at::kFloat)) * difference).sum(at::kDouble).item<double>();
}

}  // namespace isobath::quant
