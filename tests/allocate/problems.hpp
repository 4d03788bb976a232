#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <isobath/allocate/knapsack.hpp>

namespace isobath::allocate::testing {

/// Sets of different sizes with three widths each, the last with one (its width is given), at a budget
/// between the cheapest and the dearest selection.
inline Candidates small_candidates(int64_t n_sets, double share_of_range) {
  Candidates candidates;
  candidates.first.push_back(0);
  int64_t least = 0, most = 0;
  for (int64_t set = 0; set < n_sets; ++set) {
    const int64_t n_weights = 512 * (1 + set % 3 * 2);
    const bool is_given = set + 1 == n_sets;
    for (const int64_t bits : {2, 3, 4})
      if (!is_given || bits == 4) candidates.cost.push_back(n_weights * bits + n_weights / 64 * 16);
    candidates.first.push_back(candidates.size());
    least += candidates.cost[static_cast<size_t>(candidates.first[static_cast<size_t>(set)])];
    most += candidates.cost.back();
  }
  candidates.budget = least + static_cast<int64_t>(share_of_range * static_cast<double>(most - least));
  return candidates;
}

/// Scores [n_draws, n] that fall with the width and go together from set to set.
inline at::Tensor small_scores(const Candidates& candidates, int64_t n_draws, int64_t seed) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed));
  const auto draw = [&](at::IntArrayRef shape) {
    return at::randn(shape, std::optional<at::Generator>(generator), at::kDouble);
  };
  const at::Tensor common = draw({n_draws, 1});
  at::Tensor scores = at::empty({n_draws, candidates.size()}, at::kDouble);
  for (int64_t set = 0; set < candidates.n_sets(); ++set) {
    const at::Tensor direction = 0.7 * common + draw({n_draws, 1}) + 0.3;
    const auto first = candidates.first[static_cast<size_t>(set)],
               last = candidates.first[static_cast<size_t>(set) + 1];
    for (int64_t k = first; k < last; ++k)
      scores.select(1, k).copy_(
          ((direction + 0.2 * draw({n_draws, 1})) * std::pow(2.0, first - k)).squeeze(1));
  }
  return scores;
}

}  // namespace isobath::allocate::testing
