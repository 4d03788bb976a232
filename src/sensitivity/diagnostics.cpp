#include <algorithm>
#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/sensitivity/diagnostics.hpp>
#include <numeric>

namespace isobath::sensitivity {

std::vector<int64_t> largest(std::span<const double> values, int64_t k) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(std::clamp<int64_t>(k, 0, std::ssize(order))));
  return order;
}

std::vector<double> ranks_of(std::span<const double> values) {
  const std::vector<int64_t> falling = largest(values, std::ssize(values));
  const auto n = std::ssize(values);
  std::vector<double> ranks(values.size());
  for (int64_t begin = 0, end; begin < n; begin = end) {
    const double value = values[static_cast<size_t>(falling[static_cast<size_t>(begin)])];
    end = begin + 1;
    while (end < n && values[static_cast<size_t>(falling[static_cast<size_t>(end)])] == value) ++end;
    // The places begin … end − 1 from the top are the ranks n − begin … n − end + 1.
    const double rank = static_cast<double>(n) - static_cast<double>(begin + end - 1) / 2;
    for (int64_t i = begin; i < end; ++i) ranks[static_cast<size_t>(falling[static_cast<size_t>(i)])] = rank;
  }
  return ranks;
}

double rank_correlation(std::span<const double> a, std::span<const double> b) {
  ISOBATH_CHECK(a.size() == b.size(), "{} and {} values", a.size(), b.size());
  const std::vector<double> rank_a = ranks_of(a), rank_b = ranks_of(b);
  const double mean = static_cast<double>(a.size() + 1) / 2;
  double products = 0, squares_a = 0, squares_b = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    products += (rank_a[i] - mean) * (rank_b[i] - mean);
    squares_a += (rank_a[i] - mean) * (rank_a[i] - mean);
    squares_b += (rank_b[i] - mean) * (rank_b[i] - mean);
  }
  const double norms = std::sqrt(squares_a * squares_b);
  return norms > 0 ? products / norms : 0;
}

double precision_at(std::span<const double> predicted, std::span<const double> measured, int64_t k) {
  ISOBATH_CHECK(predicted.size() == measured.size(), "{} and {} values", predicted.size(), measured.size());
  const std::vector<int64_t> named = largest(predicted, k), worst = largest(measured, k);
  if (named.empty()) return 1;
  const auto n_right = std::count_if(named.begin(), named.end(), [&](int64_t place) {
    return std::find(worst.begin(), worst.end(), place) != worst.end();
  });
  return static_cast<double>(n_right) / static_cast<double>(named.size());
}

}  // namespace isobath::sensitivity
