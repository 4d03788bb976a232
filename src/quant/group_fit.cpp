#include "group_fit.hpp"

#include <algorithm>
#include <isobath/core/error.hpp>
#include <limits>

#include "candidates.hpp"
#include "simd.hpp"

namespace isobath::quant {

using simd::Floats;
using simd::Integers;
using simd::kLanes;
using simd::kRoundShift;

static_assert(kFitLanes == kLanes);

/// The columns of one group for kLanes rows, and how much each counts.
struct LaneColumns {
  const float* values;  ///< [n · stride], lanes next to each other
  int64_t stride;
  const float* importance;  ///< [n]
  int64_t n;
};

/// One grid a lane; the zero point is a small integer.
struct LaneGrids {
  Floats scale, zero;
};

/// One grid a lane as the rounding loops need it: steps from the zero point, moved by kRoundShift.
struct Levels {
  Floats scale, inverse, first, last;
};

ISOBATH_SIMD_INLINE void levels_of(const GridSpec& spec, const LaneGrids& grids, Levels& levels) {
  levels = {grids.scale, 1.0F / grids.scale,
            static_cast<float>(smallest_code(spec)) - grids.zero + kRoundShift,
            static_cast<float>(largest_code(spec)) - grids.zero + kRoundShift};
}

/// Steps from the zero point to the level nearest to w.
ISOBATH_SIMD_INLINE void nearest_steps(const Levels& levels, const Floats& w, Floats& steps) {
  steps = w * levels.inverse + kRoundShift;
  steps = steps > levels.first ? steps : levels.first;
  steps = steps < levels.last ? steps : levels.last;
  steps -= kRoundShift;
}

template <at::ScalarType kStorage>
ISOBATH_SIMD_INLINE void sum_errors(const LaneColumns& columns, const Levels& grid, const Floats& unit,
                                    Floats& error) {
  // Even and odd columns apart: one chain of additions alone would set the pace.
  constexpr int kChains = 2;
  const Levels levels = grid;
  const Floats factor = unit;
  Floats sums[kChains] = {};
  const auto add = [&](int64_t j, Floats & sum) __attribute__((always_inline)) {
    Floats w, stored;
    simd::load(w, columns.values + j * columns.stride);
    nearest_steps(levels, w, stored);
    stored *= levels.scale;
    simd::round_stored(stored, simd::kFormat<kStorage>);
    const Floats difference = (w - stored) * factor;
    sum += columns.importance[j] * difference * difference;
  };
  int64_t j = 0;
  for (; j + kChains <= columns.n; j += kChains) {
#pragma GCC unroll 2
    for (int chain = 0; chain < kChains; ++chain) add(j + chain, sums[chain]);
  }
  if (j < columns.n) add(j, sums[0]);
  error = sums[0] + sums[1];
}

/// error := Σ_j h_j ((w_j − ŵ_j) · unit)², ŵ as a loader sees it.
ISOBATH_SIMD_CLONES void weighted_error(const LaneColumns& columns, const Levels& levels, const Floats& unit,
                                        at::ScalarType storage, Floats& error) {
  if (storage == at::ScalarType::BFloat16)
    sum_errors<at::ScalarType::BFloat16>(columns, levels, unit, error);
  else if (storage == at::ScalarType::Half)
    sum_errors<at::ScalarType::Half>(columns, levels, unit, error);
  else
    sum_errors<at::ScalarType::Float>(columns, levels, unit, error);
}

/// scale := argmin_s Σ_j h_j (w_j − s k_j)² for the codes k that the grids give; 0 when all of them are 0.
ISOBATH_SIMD_CLONES void least_squares_scale(const LaneColumns& columns, const Levels& grid, Floats& scale) {
  const Levels levels = grid;
  Floats cross{}, square{};
  for (int64_t j = 0; j < columns.n; ++j) {
    Floats w, steps;
    simd::load(w, columns.values + j * columns.stride);
    nearest_steps(levels, w, steps);
    const Floats weighted = columns.importance[j] * steps;
    cross += weighted * w;
    square += weighted * steps;
  }
  scale = square > 0.0F ? cross / square : Floats{};
}

/// What a search is about; shared by its lanes.
struct FitProblem {
  const GridSpec& spec;
  const StorageFormat& format;
  std::span<const float> factors;
  LaneColumns columns;
};

/// What the lanes have found so far. Inlined into one function that has clones.
class Search {
 public:
  ISOBATH_SIMD_INLINE explicit Search(const FitProblem& problem)
      : problem_(problem),
        smallest_(static_cast<float>(smallest_code(problem.spec))),
        largest_(static_cast<float>(largest_code(problem.spec))) {
    measure_range();
    min_max();
    const Floats magnitude = most_ > -least_ ? most_ : -least_;
    const float lower = problem.spec.clip_search ? kSmallestSearched : std::numeric_limits<float>::infinity();
    is_open_ = (magnitude >= lower) & (magnitude <= kLargestSearched);
    unit_ = is_open_ ? 1.0F / magnitude : Floats{};
    // Nothing is better than what a closed lane has.
    const Floats infinity = Floats{} + std::numeric_limits<float>::infinity();
    best_error_ = is_open_ ? infinity : -infinity;
  }

  ISOBATH_SIMD_INLINE void run() {
    if (!simd::any_of(is_open_)) return;
    consider(LaneGrids(best_));
    problem_.spec.symmetric ? search_symmetric() : search_asymmetric();
    refine();
  }

  ISOBATH_SIMD_INLINE void store(RowGrid* grids) const {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      grids[lane] = {best_.scale[lane], static_cast<int>(best_.zero[lane])};
  }

 private:
  /// Smallest and largest value of each row; 0 belongs to every range, as loaders and other quantizers
  /// assume.
  ISOBATH_SIMD_INLINE void measure_range() {
    const LaneColumns columns = problem_.columns;
    Floats least{}, most{};
    for (int64_t j = 0; j < columns.n; ++j) {
      Floats w;
      simd::load(w, columns.values + j * columns.stride);
      least = w < least ? w : least;
      most = w > most ? w : most;
    }
    least_ = least;
    most_ = most;
  }

  /// storable_scale lane by lane.
  ISOBATH_SIMD_INLINE void make_storable(Floats& scale) const {
    const StorageFormat& format = problem_.format;
    const float most = largest_scale(problem_.spec, format);
    scale = scale < most ? scale : Floats{} + most;
    simd::round_stored(scale, format);
    scale = scale > format.smallest ? scale : Floats{} + format.smallest;
  }

  ISOBATH_SIMD_INLINE void min_max() {
    const float span = largest_ - smallest_;
    const Integers is_empty = most_ == least_;
    if (problem_.spec.symmetric) {
      best_.scale = (most_ > -least_ ? most_ : -least_) / (span / 2);
      make_storable(best_.scale);
      best_.zero = Floats{};
    } else {
      best_.scale = most_ / span - least_ / span;
      make_storable(best_.scale);
      best_.zero = smallest_ - least_ / best_.scale;
      simd::round_clamped(best_.zero, Floats{} + smallest_, Floats{} + largest_);
      best_.zero = is_empty ? Floats{} + smallest_ : best_.zero;
    }
    best_.scale = is_empty ? Floats{} + 1.0F : best_.scale;
  }

  /// Takes the grid of each lane where it is better than what the lane has. Whether any was.
  ISOBATH_SIMD_INLINE bool consider(const LaneGrids& grids) {
    Levels levels;
    levels_of(problem_.spec, grids, levels);
    Floats error;
    weighted_error(problem_.columns, levels, unit_, problem_.spec.storage, error);
    const Integers is_better = error < best_error_;
    best_error_ = is_better ? error : best_error_;
    best_.scale = is_better ? grids.scale : best_.scale;
    best_.zero = is_better ? grids.zero : best_.zero;
    return simd::any_of(is_better);
  }

  ISOBATH_SIMD_INLINE void search_symmetric() {
    // From the largest scale at which nothing is clipped; below it, range is traded for resolution.
    const Floats upper = most_ / largest_, lower = least_ / smallest_;
    const Floats start = upper > lower ? upper : lower;
    for (const float factor : problem_.factors) {
      LaneGrids grids{start * factor, Floats{}};
      make_storable(grids.scale);
      consider(grids);
    }
  }

  ISOBATH_SIMD_INLINE void search_asymmetric() {
    const Floats start = (most_ - least_) / (largest_ - smallest_);
    for (const float factor : problem_.factors) {
      LaneGrids grids{start * factor, {}};
      make_storable(grids.scale);
      Floats first, last, step;
      int n_zeros = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const ZeroRange zeros = zero_candidates(problem_.spec, least_[lane], most_[lane], grids.scale[lane]);
        first[lane] = static_cast<float>(zeros.first);
        last[lane] = static_cast<float>(zeros.last);
        step[lane] = static_cast<float>(zeros.step);
        if (is_open_[lane] != 0)
          n_zeros = std::max(n_zeros, (zeros.last - zeros.first + zeros.step - 1) / zeros.step + 1);
      }
      for (int i = 0; i < n_zeros; ++i) {
        const Floats zero = first + static_cast<float>(i) * step;
        grids.zero = zero < last ? zero : last;
        consider(grids);
      }
    }
  }

  ISOBATH_SIMD_INLINE void refine() {
    for (int round = 0; round < kRefinements; ++round) {
      const LaneGrids before = best_;
      Levels levels;
      levels_of(problem_.spec, before, levels);
      Floats scale;
      least_squares_scale(problem_.columns, levels, scale);
      const Integers has_scale = scale > 0.0F;
      make_storable(scale);
      bool any = false;
      for (const float shift : {0.0F, -1.0F, 1.0F}) {
        if (shift != 0 && problem_.spec.symmetric) continue;
        const Floats zero = before.zero + shift;
        const Integers exists = has_scale & (zero >= smallest_) & (zero <= largest_);
        // What a lane already has is no improvement.
        any |= consider({exists ? scale : before.scale, exists ? zero : before.zero});
      }
      if (!any) return;
    }
  }

  const FitProblem& problem_;
  float smallest_, largest_;
  Floats least_, most_, unit_;
  LaneGrids best_;
  Floats best_error_;
  Integers is_open_;  ///< lanes whose grids are looked for
};

ISOBATH_SIMD_CLONES void fit_lanes(const FitProblem& problem, RowGrid* grids) {
  Search search(problem);
  search.run();
  search.store(grids);
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

void GroupFitter::fit(const float* columns, int64_t stride, RowGrid* grids) const {
  fit_lanes({spec_, format_, factors_, {columns, stride, importance_.data(), n_columns_}}, grids);
}

float storable_scale(const GridSpec& spec, const StorageFormat& format, float scale) {
  const float largest = largest_scale(spec, format);
  return std::clamp(round_to_storage(format, std::min(scale, largest)), format.smallest, largest);
}

void encode_row(const GridSpec& spec, const RowGrid& grid, const float* weights, int64_t n, int8_t* codes) {
  const float inverse = 1.0F / grid.scale;
  const auto low = static_cast<float>(smallest_code(spec) - grid.zero);
  const auto high = static_cast<float>(largest_code(spec) - grid.zero);
  for (int64_t j = 0; j < n; ++j) {
    const float code = std::min(std::max(weights[j] * inverse, low), high);
    codes[j] = static_cast<int8_t>(static_cast<int>((code + kRoundShift) - kRoundShift) + grid.zero);
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
