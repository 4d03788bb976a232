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

static_assert(kFitLanes == kLanes);

/// Candidate grids of kLanes rows; codes are counted from the zero point.
struct Candidates {
  Floats scale, low, high;
};

/// error := Σ_j h_j ((w_j − ŵ_j) · unit)², ŵ as a loader sees it.
ISOBATH_SIMD_CLONES void weighted_error(const float* columns, int64_t stride, const float* importance,
                                        int64_t n, const Candidates& candidates, const Floats& unit,
                                        StorageFormat format, Floats& error) {
  const Floats inverse = 1.0F / candidates.scale;
  Floats sum{};
  for (int64_t j = 0; j < n; ++j) {
    Floats w;
    simd::load(w, columns + j * stride);
    Floats stored = w * inverse;
    simd::round_clamped(stored, candidates.low, candidates.high);
    stored *= candidates.scale;
    simd::round_stored(stored, format);
    const Floats difference = (w - stored) * unit;
    sum += importance[j] * difference * difference;
  }
  error = sum;
}

/// scale := argmin_s Σ_j h_j (w_j − s k_j)² for the codes k that the candidates give; 0 when all of them are
/// 0.
ISOBATH_SIMD_CLONES void least_squares_scale(const float* columns, int64_t stride, const float* importance,
                                             int64_t n, const Candidates& candidates, Floats& scale) {
  const Floats inverse = 1.0F / candidates.scale;
  Floats cross{}, square{};
  for (int64_t j = 0; j < n; ++j) {
    Floats w;
    simd::load(w, columns + j * stride);
    Floats code = w * inverse;
    simd::round_clamped(code, candidates.low, candidates.high);
    cross += importance[j] * code * w;
    square += importance[j] * code * code;
  }
  scale = square > 0.0F ? cross / square : Floats{};
}

/// Smallest and largest value of each row; 0 belongs to every range, as loaders and other quantizers assume.
ISOBATH_SIMD_CLONES void range_of(const float* columns, int64_t stride, int64_t n, Floats& least,
                                  Floats& most) {
  least = most = Floats{};
  for (int64_t j = 0; j < n; ++j) {
    Floats w;
    simd::load(w, columns + j * stride);
    least = w < least ? w : least;
    most = w > most ? w : most;
  }
}

GroupFitter::GroupFitter(const GridSpec& spec, int64_t n_columns, std::span<const float> importance)
    : spec_(spec),
      format_(storage_format(spec.storage)),
      n_columns_(n_columns),
      importance_(static_cast<size_t>(n_columns), 0.0F) {
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

struct GroupFitter::Search {
  const float* columns;
  int64_t stride;
  Floats least, most, unit;
  std::array<RowGrid, kLanes> best;
  Floats best_error;
  std::array<bool, kLanes> is_open;  ///< lanes whose grids are still looked for

  /// Takes the candidate of each open lane where it is better than what the lane has. Whether any was.
  bool consider(const GroupFitter& fitter, const std::array<RowGrid, kLanes>& candidates) {
    const Candidates levels = levels_of(fitter.spec_, candidates);
    Floats error;
    weighted_error(columns, stride, fitter.importance_.data(), fitter.n_columns_, levels, unit,
                   fitter.format_, error);
    bool any = false;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (!is_open[lane] || !(error[lane] < best_error[lane])) continue;
      best_error[lane] = error[lane];
      best[lane] = candidates[lane];
      any = true;
    }
    return any;
  }

  static Candidates levels_of(const GridSpec& spec, const std::array<RowGrid, kLanes>& grids) {
    Candidates levels;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      levels.scale[lane] = grids[lane].scale;
      levels.low[lane] = static_cast<float>(smallest_code(spec) - grids[lane].zero);
      levels.high[lane] = static_cast<float>(largest_code(spec) - grids[lane].zero);
    }
    return levels;
  }
};

static RowGrid min_max(const GridSpec& spec, const StorageFormat& format, float least, float most) {
  const auto span = static_cast<float>((1 << spec.bits) - 1);
  if (most == least) return {1.0F, spec.symmetric ? 0 : smallest_code(spec)};
  if (spec.symmetric) return {storable_scale(spec, format, std::max(most, -least) / (span / 2)), 0};
  const float scale = storable_scale(spec, format, most / span - least / span);
  const float zero = static_cast<float>(smallest_code(spec)) - least / scale;
  return {scale, static_cast<int>(std::nearbyint(std::clamp(zero, static_cast<float>(smallest_code(spec)),
                                                            static_cast<float>(largest_code(spec)))))};
}

void GroupFitter::search_symmetric(Search& search) const {
  // From the largest scale at which nothing is clipped; below it, range is traded for resolution.
  std::array<RowGrid, kLanes> candidates;
  for (const float factor : factors_) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float start = std::max(search.most[lane] / static_cast<float>(largest_code(spec_)),
                                   search.least[lane] / static_cast<float>(smallest_code(spec_)));
      candidates[lane] = {storable_scale(spec_, format_, start * factor), 0};
    }
    search.consider(*this, candidates);
  }
}

void GroupFitter::search_asymmetric(Search& search) const {
  std::array<RowGrid, kLanes> candidates;
  std::array<ZeroRange, kLanes> zeros;
  for (const float factor : factors_) {
    int n_zeros = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float least = search.least[lane], most = search.most[lane];
      const float start = (most - least) / static_cast<float>((1 << spec_.bits) - 1);
      candidates[lane].scale = storable_scale(spec_, format_, start * factor);
      zeros[lane] = zero_candidates(spec_, least, most, candidates[lane].scale);
      const ZeroRange& range = zeros[lane];
      if (search.is_open[lane])
        n_zeros = std::max(n_zeros, (range.last - range.first + range.step - 1) / range.step + 1);
    }
    for (int i = 0; i < n_zeros; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane)
        candidates[lane].zero = std::min(zeros[lane].first + i * zeros[lane].step, zeros[lane].last);
      search.consider(*this, candidates);
    }
  }
}

void GroupFitter::refine(Search& search) const {
  for (int round = 0; round < kRefinements; ++round) {
    const std::array<RowGrid, kLanes> before = search.best;
    Floats scale;
    least_squares_scale(search.columns, search.stride, importance_.data(), n_columns_,
                        Search::levels_of(spec_, before), scale);
    bool any = false;
    for (const int shift : {0, -1, 1}) {
      if (shift != 0 && spec_.symmetric) continue;
      std::array<RowGrid, kLanes> candidates;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int zero = before[lane].zero + shift;
        const bool exists = scale[lane] > 0 && zero >= smallest_code(spec_) && zero <= largest_code(spec_);
        // What a lane already has is no improvement.
        candidates[lane] = exists ? RowGrid{storable_scale(spec_, format_, scale[lane]), zero} : before[lane];
      }
      any |= search.consider(*this, candidates);
    }
    if (!any) return;
  }
}

void GroupFitter::fit(const float* columns, int64_t stride, RowGrid* grids) {
  Search search{.columns = columns,
                .stride = stride,
                .least = {},
                .most = {},
                .unit = {},
                .best = {},
                .best_error = {},
                .is_open = {}};
  range_of(columns, stride, n_columns_, search.least, search.most);
  bool any_open = false;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    search.best[lane] = min_max(spec_, format_, search.least[lane], search.most[lane]);
    const float magnitude = std::max(search.most[lane], -search.least[lane]);
    search.is_open[lane] =
        spec_.clip_search && magnitude >= kSmallestSearched && magnitude <= kLargestSearched;
    search.unit[lane] = search.is_open[lane] ? 1.0F / magnitude : 0.0F;
    search.best_error[lane] = std::numeric_limits<float>::infinity();
    any_open |= search.is_open[lane];
  }
  if (any_open) {
    search.consider(*this, search.best);
    spec_.symmetric ? search_symmetric(search) : search_asymmetric(search);
    refine(search);
  }
  std::copy(search.best.begin(), search.best.end(), grids);
}

void encode_row(const GridSpec& spec, const RowGrid& grid, const float* weights, int64_t n, int8_t* codes) {
  const float inverse = 1.0F / grid.scale;
  const auto low = static_cast<float>(smallest_code(spec) - grid.zero);
  const auto high = static_cast<float>(largest_code(spec) - grid.zero);
  for (int64_t j = 0; j < n; ++j) {
    const float code = std::min(std::max(weights[j] * inverse, low), high);
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
