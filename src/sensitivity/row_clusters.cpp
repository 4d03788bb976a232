#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <isobath/core/random.hpp>
#include <isobath/sensitivity/row_clusters.hpp>
#include <limits>
#include <numeric>

#include "probe_signs.hpp"

namespace isobath::sensitivity {
namespace {

constexpr int kMostRounds = 50;
// Rows that one thread takes at a time.
constexpr int64_t kGrain = 256;

/// Profiles of norm 1, or 0 without gradients: [d_out, n] f64, contiguous.
at::Tensor normalised(const at::Tensor& profiles) {
  ISOBATH_CHECK(profiles.dim() == 2 && profiles.is_cpu(), "profiles [d_out, n] on the CPU expected");
  const at::Tensor rows = profiles.to(at::kDouble);
  const at::Tensor norms = rows.square().sum(1, /*keepdim=*/true).sqrt();
  return at::where(norms > 0, rows / norms, at::zeros_like(rows)).contiguous();
}

/// k-means on the rows of `points`; see cluster_rows.
class Clustering {
 public:
  Clustering(const at::Tensor& points, int64_t n_groups)
      : points_(points.const_data_ptr<double>()),
        n_rows_(points.size(0)),
        length_(points.size(1)),
        group_of_(static_cast<size_t>(n_rows_), -1),
        distances_(static_cast<size_t>(n_rows_), std::numeric_limits<double>::infinity()),
        sizes_(static_cast<size_t>(n_groups), 0) {}

  void seed(const CounterRandom& random, uint64_t stream) {
    std::vector<bool> is_chosen(static_cast<size_t>(n_rows_), false);
    for (size_t group = 0; group < sizes_.size(); ++group) {
      const double u = random.uniform(stream, static_cast<uint32_t>(group), 0);
      const int64_t row = group == 0 ? static_cast<int64_t>(u * static_cast<double>(n_rows_))
                                     : draw_by_distance(u, is_chosen);
      is_chosen[static_cast<size_t>(row)] = true;
      centres_.insert(centres_.end(), point(row), point(row) + length_);
      measure_from(static_cast<int64_t>(group));
    }
  }

  void run() {
    for (int round = 0; round < kMostRounds; ++round) {
      const std::vector<int64_t> before = group_of_;
      assign();
      refill();
      if (group_of_ == before) return;
      move_centres();
    }
  }

  [[nodiscard]] RowGroups groups() const {
    // Numbered by first rows, so that the result does not depend on the order of the seeds.
    std::vector<int64_t> number(sizes_.size(), -1);
    int64_t n_numbered = 0;
    for (const int64_t group : group_of_)
      if (int64_t& n = number[static_cast<size_t>(group)]; n < 0) n = n_numbered++;
    std::vector<int64_t> order(static_cast<size_t>(n_rows_));
    std::iota(order.begin(), order.end(), int64_t{0});
    const auto number_of = [&](int64_t row) {
      return number[static_cast<size_t>(group_of_[static_cast<size_t>(row)])];
    };
    std::ranges::stable_sort(order, {}, number_of);
    RowGroups result{.order = at::tensor(order, at::kLong), .ranges = {}};
    for (int64_t begin = 0; begin < n_rows_;) {
      const auto group =
          static_cast<size_t>(group_of_[static_cast<size_t>(order[static_cast<size_t>(begin)])]);
      result.ranges.push_back({begin, begin + sizes_[group]});
      begin = result.ranges.back().end;
    }
    return result;
  }

 private:
  [[nodiscard]] const double* point(int64_t row) const { return points_ + row * length_; }

  [[nodiscard]] double distance(int64_t row, int64_t group) const {
    const double *p = point(row), *c = centres_.data() + group * length_;
    double sum = 0;
    for (int64_t i = 0; i < length_; ++i) sum += (p[i] - c[i]) * (p[i] - c[i]);
    return sum;
  }

  // A row not chosen yet, with a probability in proportion to its distance from the nearest seed; the first
  // one when all lie on seeds.
  [[nodiscard]] int64_t draw_by_distance(double u, const std::vector<bool>& is_chosen) const {
    const double threshold = u * std::accumulate(distances_.begin(), distances_.end(), 0.0);
    double sum = 0;
    int64_t last = -1;
    for (int64_t row = 0; row < n_rows_; ++row) {
      if (is_chosen[static_cast<size_t>(row)]) continue;
      if (last < 0 || distances_[static_cast<size_t>(row)] > 0) last = row;
      sum += distances_[static_cast<size_t>(row)];
      if (sum > threshold) return row;
    }
    return last;
  }

  void measure_from(int64_t group) {
    at::parallel_for(0, n_rows_, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        double& nearest = distances_[static_cast<size_t>(row)];
        nearest = std::min(nearest, distance(row, group));
      }
    });
  }

  void assign() {
    at::parallel_for(0, n_rows_, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        double nearest = std::numeric_limits<double>::infinity();
        for (int64_t group = 0; group < std::ssize(sizes_); ++group) {
          const double found = distance(row, group);
          if (found >= nearest) continue;
          nearest = found;
          group_of_[static_cast<size_t>(row)] = group;
        }
        distances_[static_cast<size_t>(row)] = nearest;
      }
    });
    std::ranges::fill(sizes_, 0);
    for (const int64_t group : group_of_) ++sizes_[static_cast<size_t>(group)];
  }

  // Each empty group takes the farthest row of the groups that have several.
  void refill() {
    for (size_t empty = 0; empty < sizes_.size(); ++empty) {
      if (sizes_[empty] > 0) continue;
      size_t farthest = 0;
      double most = -1;
      for (size_t row = 0; row < group_of_.size(); ++row) {
        if (sizes_[static_cast<size_t>(group_of_[row])] < 2 || distances_[row] <= most) continue;
        most = distances_[row];
        farthest = row;
      }
      --sizes_[static_cast<size_t>(group_of_[farthest])];
      group_of_[farthest] = static_cast<int64_t>(empty);
      sizes_[empty] = 1;
      distances_[farthest] = 0;
    }
  }

  void move_centres() {
    std::ranges::fill(centres_, 0.0);
    for (int64_t row = 0; row < n_rows_; ++row) {
      const int64_t group = group_of_[static_cast<size_t>(row)];
      for (int64_t i = 0; i < length_; ++i)
        centres_[static_cast<size_t>(group * length_ + i)] += point(row)[i];
    }
    for (size_t i = 0; i < centres_.size(); ++i)
      centres_[i] /= static_cast<double>(sizes_[i / static_cast<size_t>(length_)]);
  }

  const double* points_;
  int64_t n_rows_, length_;
  std::vector<int64_t> group_of_;  // of each row
  std::vector<double> distances_;  // squared, of each row to its centre or the nearest seed
  std::vector<int64_t> sizes_;
  std::vector<double> centres_;  // [groups, length]
};

}  // namespace

at::Tensor row_profiles(const at::Tensor& gradient, int64_t first_sequence, uint64_t seed) {
  ISOBATH_CHECK(gradient.dim() == 3, "row_profiles expects a gradient [b, T, d_out], found {} dimensions",
                gradient.dim());
  const c10::NoGradGuard no_grad;
  const CounterRandom random(seed, RandomPurpose::row_profile);
  at::Tensor profiles = at::zeros({kProfileLength, gradient.size(2)}, gradient.options().dtype(at::kFloat));
  for (int64_t s = 0; s < gradient.size(0); ++s) {
    const at::Tensor signs = probe_signs(random, first_sequence + s, 0, kProfileLength, gradient.size(1));
    profiles.addmm_(signs.to(gradient.device()), gradient[s].to(at::kFloat).square());
  }
  return profiles.t().contiguous().cpu();
}

RowGroups cluster_rows(const at::Tensor& profiles, int64_t n_groups, uint64_t seed, uint64_t stream) {
  const at::Tensor points = normalised(profiles);
  ISOBATH_CHECK(1 <= n_groups && n_groups <= points.size(0), "{} groups of {} rows", n_groups,
                points.size(0));
  const at::Tensor bad = profiles.isfinite().all(1).logical_not();
  if (bad.any().item<bool>())
    fail<NumericError>("the gradients of output row {} are not finite",
                       bad.to(at::kInt).argmax().item<int64_t>());
  Clustering clustering(points, n_groups);
  clustering.seed(CounterRandom(seed, RandomPurpose::row_cluster), stream);
  clustering.run();
  return clustering.groups();
}

double deviation_within(const at::Tensor& profiles, const RowGroups& groups) {
  at::Tensor points = normalised(profiles);
  if (groups.order.defined()) points = points.index_select(0, groups.order);
  double sum = 0;
  for (const Range& range : groups.ranges) {
    const at::Tensor rows = points.slice(0, range.begin, range.end);
    sum += (rows - rows.mean(0, /*keepdim=*/true)).square().sum().item<double>();
  }
  return sum;
}

}  // namespace isobath::sensitivity
