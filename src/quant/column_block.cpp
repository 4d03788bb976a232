#include "column_block.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;
using simd::Words;

static_assert(kRowTile % kLanes == 0);
static constexpr int64_t kParts = kRowTile / kLanes;

/// sums[c][v] := Σ over columns i of from, in their order, onto targets[c, v]: what they feed to kColumns
/// columns and 8·kVectors rows. `targets`, `errors` start at the first of the rows, `factors` at the row of
/// the first column. Register tiles: an error is loaded once for kColumns multiply-adds.
template <int kColumns, int kVectors>
ISOBATH_SIMD_INLINE void sum_feedback(const float* targets, const float* errors, const float* factors,
                                      Range from, Floats (&sums)[kColumns][kVectors]) {
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) simd::load(sums[c][v], targets + c * kRowTile + v * kLanes);
  for (int64_t i = from.begin; i < from.end; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const float factor = factors[c * kBlock + i];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Floats error;
        simd::load(error, errors + i * kRowTile + v * kLanes);
        sums[c][v] += error * factor;
      }
    }
  }
}

template <int kColumns, int kVectors>
ISOBATH_SIMD_INLINE void feed_tile(float* targets, const float* errors, const float* factors, Range from) {
  Floats sums[kColumns][kVectors];
  sum_feedback(targets, errors, factors, from, sums);
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) simd::store(targets + c * kRowTile + v * kLanes, sums[c][v]);
}

/// targets [to] += what the errors of the columns `from` feed to them.
ISOBATH_SIMD_INLINE void feed(float* targets, const float* errors, Range from, Range to,
                              const BlockFeedback& feedback) {
  if (from.size() <= 0) return;
  constexpr int kColumns = 4, kVectors = 2;
  const float* factors = feedback.rows.data();
  int64_t k = to.begin;
  for (; k + kColumns <= to.end; k += kColumns)
    for (int64_t row = 0; row < kRowTile; row += kVectors * kLanes)
      feed_tile<kColumns, kVectors>(targets + k * kRowTile + row, errors + row, factors + k * kBlock, from);
  for (; k < to.end; ++k) feed_tile<1, kParts>(targets + k * kRowTile, errors, factors + k * kBlock, from);
}

ISOBATH_SIMD_CLONES void feed_forward(ColumnBlock& block, Range from, Range to,
                                      const BlockFeedback& feedback) {
  feed(block.targets.data(), block.errors.data(), from, to, feedback);
}

ISOBATH_SIMD_CLONES void settle_columns(ColumnBlock& block, Range columns, const BlockFeedback& feedback) {
  float* settled = block.settled.data();
  std::memcpy(settled + columns.begin * kRowTile, block.targets.data() + columns.begin * kRowTile,
              static_cast<size_t>(columns.size() * kRowTile) * sizeof(float));
  for (int64_t begin = columns.begin; begin < columns.end; begin += kStep) {
    const Range step{begin, std::min(begin + kStep, columns.end)};
    feed(settled, block.shifts.data(), {columns.begin, begin}, step, feedback);
    for (int64_t k = step.begin; k < step.end; ++k) {
      const int64_t at = k * kRowTile;
      Floats sums[1][kParts];
      sum_feedback(settled + at, block.shifts.data(), feedback.rows.data() + k * kBlock, {begin, k}, sums);
#pragma GCC unroll 8
      for (int64_t part = 0; part < kParts; ++part) {
        Floats w;
        simd::load(w, block.errors.data() + at + part * kLanes);
        simd::store(settled + at + part * kLanes, sums[0][part]);
        simd::store(block.shifts.data() + at + part * kLanes, w - sums[0][part]);
      }
    }
  }
}

/// Rounds one column, which starts at `at`, for kLanes rows.
template <at::ScalarType kStorage>
ISOBATH_SIMD_INLINE void round_part(ColumnBlock& block, int64_t at, const TileGrids& grid, int64_t row,
                                    float smallest, float curvature, const Floats& target, Floats& squares) {
  Floats w, scale, inverse, low, high;
  simd::load(w, block.errors.data() + at + row);
  simd::load(scale, grid.scale.data() + row);
  simd::load(inverse, grid.inverse.data() + row);
  simd::load(low, grid.low.data() + row);
  simd::load(high, grid.high.data() + row);
  Floats steps = target * inverse;
  simd::round_clamped(steps, low, high);
  // The lowest level has the smallest code.
  simd::store(block.targets.data() + at + row, (steps - low) + (smallest + simd::kRoundShift));
  // The error fed back is that of the weight a loader will see.
  Floats stored = steps * scale;
  simd::round_stored(stored, simd::kFormat<kStorage>);
  const Floats missed = target - stored;
  squares += curvature * missed * missed;
  simd::store(block.errors.data() + at + row, w - stored);
}

template <at::ScalarType kStorage>
ISOBATH_SIMD_INLINE void solve(ColumnBlock& block, Range columns, const BlockFeedback& feedback,
                               const TileGrids* const* grids, float smallest) {
  Floats squares;
  simd::load(squares, block.squares.data());
  for (int64_t begin = columns.begin; begin < columns.end; begin += kStep) {
    const Range step{begin, std::min(begin + kStep, columns.end)};
    feed(block.targets.data(), block.errors.data(), {columns.begin, begin}, step, feedback);
    for (int64_t k = step.begin; k < step.end; ++k) {
      const int64_t at = k * kRowTile;
      Floats sums[1][kParts];
      sum_feedback(block.targets.data() + at, block.errors.data(), feedback.rows.data() + k * kBlock,
                   {begin, k}, sums);
#pragma GCC unroll 8
      for (int64_t part = 0; part < kParts; ++part)
        round_part<kStorage>(block, at, *grids[k], part * kLanes, smallest, feedback.curvature[k],
                             sums[0][part], squares);
    }
  }
  simd::store(block.squares.data(), squares);
}

ISOBATH_SIMD_CLONES void solve_columns(ColumnBlock& block, Range columns, const BlockFeedback& feedback,
                                       const TileGrids* const* grids, const GridSpec& spec) {
  const auto smallest = static_cast<float>(smallest_code(spec));
  if (spec.storage == at::ScalarType::BFloat16)
    solve<at::ScalarType::BFloat16>(block, columns, feedback, grids, smallest);
  else if (spec.storage == at::ScalarType::Half)
    solve<at::ScalarType::Half>(block, columns, feedback, grids, smallest);
  else
    solve<at::ScalarType::Float>(block, columns, feedback, grids, smallest);
}

/// A code is the lowest byte of code + kRoundShift.
ISOBATH_SIMD_INLINE void load_codes(Words& codes, const float* shifted) {
  std::memcpy(&codes, shifted, sizeof(codes));
  codes &= 0xffU;
}

ISOBATH_SIMD_CLONES void take_codes(const ColumnBlock& block, int64_t n, int64_t n_rows, int8_t* codes,
                                    int64_t stride) {
  for (int64_t row = 0; row < n_rows; row += kLanes) {
    const int64_t n_lanes = std::min(kLanes, n_rows - row);
    const float* from = block.targets.data() + row;
    int8_t* to = codes + row * stride;
    int64_t k = 0;
    // Four columns are one word a row.
    for (; k + 4 <= n; k += 4) {
      Words word{};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Words column;
        load_codes(column, from + (k + i) * kRowTile);
        word |= column << (8 * i);
      }
      for (int64_t lane = 0; lane < n_lanes; ++lane) {
        const auto of_row = static_cast<uint32_t>(word[lane]);
        std::memcpy(to + lane * stride + k, &of_row, sizeof(of_row));
      }
    }
    for (; k < n; ++k) {
      Words column;
      load_codes(column, from + k * kRowTile);
      for (int64_t lane = 0; lane < n_lanes; ++lane)
        to[lane * stride + k] = static_cast<int8_t>(column[lane]);
    }
  }
}

}  // namespace isobath::quant
