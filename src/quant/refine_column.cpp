#include "refine_column.hpp"

#include "simd.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;

static constexpr int64_t kParts = kRowTile / kLanes;

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

}  // namespace isobath::quant
