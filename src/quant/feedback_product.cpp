#include "feedback_product.hpp"

#include <algorithm>
#include <isobath/core/error.hpp>

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;

static constexpr int64_t kSliver = FeedbackColumns::kSliver;
static constexpr int kVectors = 2;
static constexpr int64_t kTileRows = kVectors * kLanes;

/// Sources between two visits of the targets: so many errors of kTileRows rows stay in the first-level cache
/// while all columns pass.
static constexpr int64_t kSources = 256;

/// targets [n_columns, kTileRows], `stride` between columns, += sliver [n, kSliver] times errors [n,
/// kTileRows].
ISOBATH_SIMD_INLINE void add_tile(const float* sliver, const float* errors, int64_t n, float* targets,
                                  int64_t stride, int64_t n_columns) {
  Floats sums[kSliver][kVectors] = {};
  for (int64_t i = 0; i < n; ++i) {
    Floats error[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) simd::load(error[v], errors + i * kTileRows + v * kLanes);
#pragma GCC unroll 6
    for (int64_t c = 0; c < kSliver; ++c) {
      const float factor = sliver[i * kSliver + c];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[c][v] += error[v] * factor;
    }
  }
#pragma GCC unroll 6
  for (int64_t c = 0; c < kSliver; ++c) {
    if (c >= n_columns) break;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Floats target;
      simd::load(target, targets + c * stride + v * kLanes);
      target += sums[c][v];
      simd::store(targets + c * stride + v * kLanes, target);
    }
  }
}

ISOBATH_SIMD_CLONES void add_slivers(const float* slivers, int64_t n_sources, int64_t n_columns,
                                     const float* errors, int64_t n_rows, float* targets) {
  alignas(64) float packed[kSources * kTileRows];
  for (int64_t begin = 0; begin < n_sources; begin += kSources) {
    const int64_t n = std::min(kSources, n_sources - begin);
    for (int64_t row = 0; row < n_rows; row += kTileRows) {
      for (int64_t i = 0; i < n; ++i)
        std::memcpy(packed + i * kTileRows, errors + (begin + i) * n_rows + row, kTileRows * sizeof(float));
      for (int64_t k = 0; k < n_columns; k += kSliver)
        add_tile(slivers + k * n_sources + begin * kSliver, packed, n, targets + k * n_rows + row, n_rows,
                 n_columns - k);
    }
  }
}

FeedbackColumns::FeedbackColumns(int64_t n_sources, int64_t n_columns)
    : n_sources_(n_sources), n_columns_(n_columns) {
  const int64_t n_slivers = (n_columns + kSliver - 1) / kSliver;
  values_ = std::make_unique<float[]>(static_cast<size_t>(n_slivers * n_sources * kSliver));
}

void FeedbackColumns::pack(const float* from, int64_t stride, Range sources, Range columns) {
  ISOBATH_CHECK(
      0 <= sources.begin && sources.end <= n_sources_ && 0 <= columns.begin && columns.end <= n_columns_,
      "sources to {} and columns to {} of {} and {}", sources.end, columns.end, n_sources_, n_columns_);
  // Some sources at a time: their cache lines are visited once for each column.
  constexpr int64_t kAtOnce = 32;
  for (int64_t begin = sources.begin; begin < sources.end; begin += kAtOnce)
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      float* to = values_.get() + k / kSliver * kSliver * n_sources_ + k % kSliver;
      for (int64_t i = begin; i < std::min(begin + kAtOnce, sources.end); ++i)
        to[i * kSliver] = from[i * stride + (k - columns.begin)];
    }
}

void FeedbackColumns::add_product(const float* errors, int64_t n_rows, float* targets) const {
  ISOBATH_CHECK(n_rows % kTileRows == 0, "{} rows", n_rows);
  add_slivers(values_.get(), n_sources_, n_columns_, errors, n_rows, targets);
}

}  // namespace isobath::quant
