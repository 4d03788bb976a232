#include "grid_step.hpp"
#include "row_threads.hpp"

namespace isobath::quant::cuda {
namespace {

struct Grid {
  float scale;
  int zero;
};

/// The weights of one row in one group.
struct Group {
  const float* weights;  ///< weight j at weights[j · stride]
  int64_t stride, width;
  const float* importance;
  float least, most;  ///< 0 belongs to every range
  float unit;         ///< 1 / largest magnitude
};

/// The step of the grid that the host's search takes: rounded by a multiply-add, then clamped.
__device__ float searched_step(const Levels& levels, float value) {
  const float first = levels.low + kRoundShift, last = levels.high + kRoundShift;
  float step = fmaf(value, levels.inverse, kRoundShift);
  step = step > first ? step : first;
  step = step < last ? step : last;
  return step - kRoundShift;
}

__device__ float weighted_error(const Group& group, const GridRules& rules, const Grid& grid) {
  const Levels levels = levels_of(rules, grid.scale, grid.zero);
  // Even and odd columns apart, as on the host.
  float sums[2] = {0.0F, 0.0F};
  for (int64_t j = 0; j < group.width; ++j) {
    const float w = group.weights[j * group.stride];
    const float stored = round_stored(rules.format, searched_step(levels, w) * levels.scale);
    const float difference = (w - stored) * group.unit;
    sums[j % 2] = fmaf(group.importance[j] * difference, difference, sums[j % 2]);
  }
  return sums[0] + sums[1];
}

/// argmin_s Σ_j h_j (w_j − s k_j)² for the codes k of the grid; 0 when all of them are 0.
__device__ float least_squares_scale(const Group& group, const GridRules& rules, const Grid& grid) {
  const Levels levels = levels_of(rules, grid.scale, grid.zero);
  float cross = 0.0F, square = 0.0F;
  for (int64_t j = 0; j < group.width; ++j) {
    const float w = group.weights[j * group.stride], step = searched_step(levels, w);
    cross = fmaf(group.importance[j] * step, w, cross);
    square = fmaf(group.importance[j] * step, step, square);
  }
  return square > 0.0F ? cross / square : 0.0F;
}

__device__ Grid min_max(const Group& group, const GridRules& rules) {
  const float span = static_cast<float>((1 << rules.bits) - 1);
  const int lowest = smallest_code(rules);
  if (group.most == group.least) return {1.0F, rules.is_symmetric ? 0 : lowest};
  if (rules.is_symmetric) return {storable_scale(rules, larger(group.most, -group.least) / (span / 2)), 0};
  const float scale = storable_scale(rules, group.most / span - group.least / span);
  const float zero = static_cast<float>(lowest) - group.least / scale;
  const float inside =
      smaller(larger(zero, static_cast<float>(lowest)), static_cast<float>(largest_code(rules)));
  return {scale, static_cast<int>(rintf(inside))};
}

/// The code that the zero point has when a window of codes ends at `value`.
__device__ int zero_of(const GridRules& rules, double value) {
  const double lowest = smallest_code(rules), highest = largest_code(rules);
  return static_cast<int>(rint(value < lowest ? lowest : highest < value ? highest : value));
}

/// Candidate i: 0 the min–max grid, then the shrink factors in order, each with max_zeros zero points (the
/// last one repeated where there are fewer).
__device__ Grid candidate(const Group& group, const GridRules& rules, int i) {
  if (i == 0) return min_max(group, rules);
  if (rules.is_symmetric) {
    const float start = larger(group.most / static_cast<float>(largest_code(rules)),
                               group.least / static_cast<float>(smallest_code(rules)));
    return {storable_scale(rules, start * rules.factors[i - 1]), 0};
  }
  const float start = (group.most - group.least) / static_cast<float>((1 << rules.bits) - 1);
  const float scale = storable_scale(rules, start * rules.factors[(i - 1) / rules.max_zeros]);
  const int a = zero_of(rules, largest_code(rules) - double{group.most} / double{scale}),
            b = zero_of(rules, smallest_code(rules) - double{group.least} / double{scale});
  const int first = a < b ? a : b, last = a < b ? b : a;
  const int spread = (last - first + rules.max_zeros - 2) / (rules.max_zeros - 1);
  const int zero = first + (i - 1) % rules.max_zeros * (spread > 1 ? spread : 1);
  return {scale, zero < last ? zero : last};
}

/// What a lane, and in the end the warp, has found: the smallest error, of equal ones the first.
struct Found {
  float error;
  int index;
};

__device__ Found first_smallest(Found found) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const float error = __shfl_xor_sync(kAllLanes, found.error, mask);
    const int index = __shfl_xor_sync(kAllLanes, found.index, mask);
    if (error < found.error || (error == found.error && index < found.index)) found = {error, index};
  }
  return found;
}

__device__ Grid search(const Group& group, const GridRules& rules, int lane) {
  const float infinity = __uint_as_float(0x7f800000U);
  const int n_candidates = 1 + rules.n_factors * (rules.is_symmetric ? 1 : rules.max_zeros);
  Found found{infinity, 0};
  for (int i = lane; i < n_candidates; i += kLanes) {
    const float error = weighted_error(group, rules, candidate(group, rules, i));
    if (error < found.error) found = {error, i};
  }
  found = first_smallest(found);
  Grid best = candidate(group, rules, found.index);
  for (int round = 0; round < rules.n_refinements; ++round) {
    const float scale = least_squares_scale(group, rules, best);
    // Three lanes: the zero point as it is, one lower, one higher.
    const Grid moved{scale > 0.0F ? storable_scale(rules, scale) : best.scale, best.zero + (lane == 1   ? -1
                                                                                            : lane == 2 ? 1
                                                                                                        : 0)};
    const bool exists =
        scale > 0.0F && moved.zero >= smallest_code(rules) && moved.zero <= largest_code(rules);
    const bool is_tried = exists && lane < (rules.is_symmetric ? 1 : 3);
    const Found next = first_smallest({is_tried ? weighted_error(group, rules, moved) : infinity, lane});
    if (!(next.error < found.error)) break;
    found.error = next.error;
    best = {moved.scale, best.zero + (next.index == 1 ? -1 : next.index == 2 ? 1 : 0)};
  }
  return best;
}

__global__ void __launch_bounds__(kWarps* kLanes)
    fit_kernel(const float* columns, int64_t n_rows, int64_t width, const float* importance, GridRules rules,
               Grids grids) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes, index = blockIdx.y;
  if (row >= n_rows) return;
  Group group{
      columns + index * width * n_rows + row, n_rows, width, importance + index * width, 0.0F, 0.0F, 0.0F};
  for (int64_t j = 0; j < width; ++j) {
    const float w = group.weights[j * n_rows];
    group.least = w < group.least ? w : group.least;
    group.most = w > group.most ? w : group.most;
  }
  const float magnitude = larger(group.most, -group.least);
  Grid grid = min_max(group, rules);
  if (rules.is_searched && magnitude >= rules.smallest_searched && magnitude <= rules.largest_searched) {
    group.unit = 1.0F / magnitude;
    grid = search(group, rules, lane);
  }
  if (lane != 0) return;
  grids.scale[index * n_rows + row] = grid.scale;
  grids.zero[index * n_rows + row] = static_cast<int8_t>(grid.zero);
}

}  // namespace

int fit_groups(const float* columns, int64_t n_rows, int64_t n_groups, int64_t width, const float* importance,
               const GridRules& rules, Grids grids, Stream stream) {
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>((n_rows + kWarps - 1) / kWarps), static_cast<unsigned>(n_groups));
  config.blockDim = dim3(kWarps * kLanes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, fit_kernel, columns, n_rows, width, importance, rules, grids);
}

}  // namespace isobath::quant::cuda
