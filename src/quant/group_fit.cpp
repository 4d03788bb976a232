#include "group_fit.hpp"

#include <algorithm>
#include <cmath>
#include <isobath/core/error.hpp>
#include <limits>

#include "candidates.hpp"
#include "simd.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::kLanes;

/// What the kernels need of a candidate grid; codes are counted from the zero point.
struct Levels {
  float scale, inverse, low, high;
};

static Levels levels_of(const GridSpec& spec, const RowGrid& grid) {
  return {grid.scale, 1.0F / grid.scale, static_cast<float>(smallest_code(spec) - grid.zero),
          static_cast<float>(largest_code(spec) - grid.zero)};
}

/// Σ_j h_j ((w_j − ŵ_j) · unit)², ŵ as a loader sees it. n is a multiple of kLanes.
ISOBATH_SIMD_CLONES float weighted_error(const float* weights, const float* importance, int64_t n,
                                         Levels levels, float unit, StorageFormat format) {
  const Floats low = Floats{} + levels.low, high = Floats{} + levels.high;
  Floats sum{};
  for (int64_t j = 0; j < n; j += kLanes) {
    Floats w, h;
    simd::load(w, weights + j);
    simd::load(h, importance + j);
    Floats stored = w * levels.inverse;
    simd::round_clamped(stored, low, high);
    stored *= levels.scale;
    simd::round_stored(stored, format);
    const Floats difference = (w - stored) * unit;
    sum += h * difference * difference;
  }
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

/// argmin_s Σ_j h_j (w_j − s k_j)² for the codes k that `levels` gives; 0 when all of them are 0.
ISOBATH_SIMD_CLONES float least_squares_scale(const float* weights, const float* importance, int64_t n,
                                              Levels levels) {
  const Floats low = Floats{} + levels.low, high = Floats{} + levels.high;
  Floats cross{}, square{};
  for (int64_t j = 0; j < n; j += kLanes) {
    Floats w, h;
    simd::load(w, weights + j);
    simd::load(h, importance + j);
    Floats code = w * levels.inverse;
    simd::round_clamped(code, low, high);
    cross += h * code * w;
    square += h * code * code;
  }
  float numerator = 0, denominator = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    numerator += cross[lane];
    denominator += square[lane];
  }
  return denominator > 0 ? numerator / denominator : 0;
}

GroupFitter::GroupFitter(const GridSpec& spec, int64_t n_columns, std::span<const float> importance)
    : spec_(spec),
      format_(storage_format(spec.storage)),
      n_columns_(n_columns),
      n_padded_((n_columns + kLanes - 1) / kLanes * kLanes),
      importance_(n_padded_, 0.0F),
      weights_(n_padded_, 0.0F) {
  ISOBATH_CHECK(importance.empty() || std::ssize(importance) == n_columns, "{} importances for {} columns",
                importance.size(), n_columns);
  if (spec.clip_search) factors_ = shrink_factors(spec);
  // Relative weights: Fisher-weighted diagonals reach 1e-30, whose products with squared errors underflow.
  const float largest = importance.empty() ? 0.0F : *std::max_element(importance.begin(), importance.end());
  for (int64_t j = 0; j < n_columns; ++j) importance_[j] = largest > 0 ? importance[j] / largest : 1.0F;
}

float storable_scale(const GridSpec& spec, const StorageFormat& format, float scale) {
  const auto largest = round_to_storage(format, format.largest / static_cast<float>(1 << (spec.bits + 1)));
  return std::clamp(round_to_storage(format, std::min(scale, largest)), format.smallest, largest);
}

RowGrid GroupFitter::min_max() const {
  const auto span = static_cast<float>((1 << spec_.bits) - 1);
  if (max_ == min_) return {1.0F, spec_.symmetric ? 0 : smallest_code(spec_)};
  if (spec_.symmetric) return {storable(std::max(max_, -min_) / (span / 2)), 0};
  const float scale = storable(max_ / span - min_ / span);
  const float zero = static_cast<float>(smallest_code(spec_)) - min_ / scale;
  return {scale, static_cast<int>(std::nearbyint(std::clamp(zero, static_cast<float>(smallest_code(spec_)),
                                                            static_cast<float>(largest_code(spec_)))))};
}

void GroupFitter::consider(RowGrid candidate) {
  const float unit = 1.0F / std::max(max_, -min_);
  const float error = weighted_error(weights_.data(), importance_.data(), n_padded_,
                                     levels_of(spec_, candidate), unit, format_);
  if (error < best_error_) {
    best_error_ = error;
    best_ = candidate;
  }
}

void GroupFitter::search_symmetric() {
  // The largest scale at which nothing is clipped; below it, range is traded for resolution.
  const float start = std::max(max_ / static_cast<float>(largest_code(spec_)),
                               min_ / static_cast<float>(smallest_code(spec_)));
  float previous = 0;
  for (const float factor : factors_) {
    const float scale = storable(start * factor);
    if (scale != previous) consider({scale, 0});
    previous = scale;
  }
}

void GroupFitter::search_asymmetric() {
  const float start = (max_ - min_) / static_cast<float>((1 << spec_.bits) - 1);
  float previous = 0;
  for (const float factor : factors_) {
    const float scale = storable(start * factor);
    if (scale == previous) continue;
    previous = scale;
    const ZeroRange zeros = zero_candidates(spec_, min_, max_, scale);
    for (int zero = zeros.first; zero < zeros.last; zero += zeros.step) consider({scale, zero});
    consider({scale, zeros.last});
  }
}

void GroupFitter::refine() {
  for (int round = 0; round < kRefinements; ++round) {
    const RowGrid before = best_;
    const float scale =
        least_squares_scale(weights_.data(), importance_.data(), n_padded_, levels_of(spec_, before));
    if (!(scale > 0)) return;
    consider({storable(scale), before.zero});
    if (!spec_.symmetric) {
      for (const int zero : {before.zero - 1, before.zero + 1}) {
        if (zero >= smallest_code(spec_) && zero <= largest_code(spec_)) consider({storable(scale), zero});
      }
    }
    if (best_.scale == before.scale && best_.zero == before.zero) return;
  }
}

RowGrid GroupFitter::fit(const float* weights) {
  std::copy_n(weights, n_columns_, weights_.begin());
  // 0 belongs to every range, as loaders and other quantizers assume.
  min_ = std::min(0.0F, *std::min_element(weights, weights + n_columns_));
  max_ = std::max(0.0F, *std::max_element(weights, weights + n_columns_));
  best_ = min_max();
  const float magnitude = std::max(max_, -min_);
  if (!spec_.clip_search || magnitude < kSmallestSearched || magnitude > kLargestSearched) return best_;
  const RowGrid first = best_;
  best_error_ = std::numeric_limits<float>::infinity();
  consider(first);
  spec_.symmetric ? search_symmetric() : search_asymmetric();
  refine();
  return best_;
}

void encode_row(const GridSpec& spec, const RowGrid& grid, const float* weights, int64_t n, int8_t* codes) {
  const Levels levels = levels_of(spec, grid);
  for (int64_t j = 0; j < n; ++j) {
    const float code = std::min(std::max(weights[j] * levels.inverse, levels.low), levels.high);
    codes[j] =
        static_cast<int8_t>(static_cast<int>((code + simd::kRoundShift) - simd::kRoundShift) + grid.zero);
  }
}

void check_spec(const GridSpec& spec) {
  const bool known = spec.bits == 2 || spec.bits == 3 || spec.bits == 4 || spec.bits == 5 || spec.bits == 6 ||
                     spec.bits == 8;
  if (!known) fail<ConfigError>("weights are quantized to 2, 3, 4, 5, 6 or 8 bits, not {}", spec.bits);
  if (spec.group < 0)
    fail<ConfigError>("the group must be a number of columns, or 0 for whole rows, not {}", spec.group);
  (void)storage_format(spec.storage);
}

}  // namespace isobath::quant
