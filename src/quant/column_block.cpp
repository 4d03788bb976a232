#include "column_block.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;

static_assert(kRowTile % kLanes == 0);
static constexpr int64_t kParts = kRowTile / kLanes;

ISOBATH_SIMD_CLONES void solve_columns(ColumnBlock& block, int64_t begin, int64_t end,
                                       const BlockFeedback& feedback, const TileGrids* const* grids,
                                       const StorageFormat& format) {
  using Bytes = int8_t __attribute__((vector_size(kLanes)));
  Floats squares;
  simd::load(squares, block.squares.data());
  for (int64_t k = begin; k < end; ++k) {
    const TileGrids& grid = *grids[k];
    const float curvature = feedback.curvature[k];
    Floats errors[kParts];
    for (int64_t part = 0; part < kParts; ++part) {
      const int64_t row = part * kLanes, at = k * kRowTile + row;
      Floats target, w, scale, inverse, low, high;
      simd::load(target, block.targets.data() + at);
      simd::load(w, block.errors.data() + at);
      simd::load(scale, grid.scale.data() + row);
      simd::load(inverse, grid.inverse.data() + row);
      simd::load(low, grid.low.data() + row);
      simd::load(high, grid.high.data() + row);
      Floats steps = target * inverse;
      simd::round_clamped(steps, low, high);
      Bytes zero;
      std::memcpy(&zero, grid.zero.data() + row, sizeof(zero));
      const Bytes codes =
          __builtin_convertvector(__builtin_convertvector(steps, simd::Integers), Bytes) + zero;
      std::memcpy(block.codes.data() + at, &codes, sizeof(codes));
      // The error fed back is that of the weight a loader will see.
      Floats stored = steps * scale;
      simd::round_stored(stored, format);
      const Floats missed = target - stored;
      squares += curvature * missed * missed;
      errors[part] = w - stored;
      simd::store(block.errors.data() + at, errors[part]);
    }
    for (int64_t later = k + 1; later < end; ++later) {
      float* column = block.targets.data() + later * kRowTile;
      const float factor = feedback.rows[later * kBlock + k];
      for (int64_t part = 0; part < kParts; ++part) {
        Floats target;
        simd::load(target, column + part * kLanes);
        target += errors[part] * factor;
        simd::store(column + part * kLanes, target);
      }
    }
  }
  simd::store(block.squares.data(), squares);
}

/// sums := target of column k and the fed errors [begin, end) of others. All rows of the column stay in
/// registers: an error is loaded once for each multiply-add, nothing is stored.
ISOBATH_SIMD_INLINE void sum_feedback(const float* target, const float* errors, const float* factors,
                                      int64_t begin, int64_t end, Floats (&sums)[kParts]) {
  for (int64_t part = 0; part < kParts; ++part) simd::load(sums[part], target + part * kLanes);
  for (int64_t i = begin; i < end; ++i)
    for (int64_t part = 0; part < kParts; ++part) {
      Floats error;
      simd::load(error, errors + i * kRowTile + part * kLanes);
      sums[part] += error * factors[i];
    }
}

ISOBATH_SIMD_CLONES void feed_forward(ColumnBlock& block, int64_t begin, int64_t end, int64_t n,
                                      const BlockFeedback& feedback) {
  for (int64_t k = end; k < n; ++k) {
    float* column = block.targets.data() + k * kRowTile;
    Floats sums[kParts];
    sum_feedback(column, block.errors.data(), feedback.rows.data() + k * kBlock, begin, end, sums);
    for (int64_t part = 0; part < kParts; ++part) simd::store(column + part * kLanes, sums[part]);
  }
}

ISOBATH_SIMD_CLONES void settle_columns(ColumnBlock& block, int64_t begin, int64_t end,
                                        const BlockFeedback& feedback) {
  for (int64_t k = begin; k < end; ++k) {
    const int64_t at = k * kRowTile;
    Floats sums[kParts];
    sum_feedback(block.targets.data() + at, block.shifts.data(), feedback.rows.data() + k * kBlock, begin, k,
                 sums);
    for (int64_t part = 0; part < kParts; ++part) {
      Floats w;
      simd::load(w, block.errors.data() + at + part * kLanes);
      simd::store(block.settled.data() + at + part * kLanes, sums[part]);
      simd::store(block.shifts.data() + at + part * kLanes, w - sums[part]);
    }
  }
}

}  // namespace isobath::quant
