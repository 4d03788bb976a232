#pragma once
#include <isobath/allocate/knapsack.hpp>
#include <isobath/core/error.hpp>

namespace isobath::allocate {

/// Calls use(selection) for every selection within the budget, the last set's candidate changing first.
template <class Use>
void for_each_selection(const Candidates& candidates, const Use& use) {
  constexpr double kMost = 1 << 20;
  double n_selections = 1;
  for (size_t set = 0; set + 1 < candidates.first.size(); ++set)
    n_selections *= static_cast<double>(candidates.first[set + 1] - candidates.first[set]);
  ISOBATH_CHECK(n_selections <= kMost, "{} selections are too many to try all", n_selections);
  Selection selection(candidates.first.begin(), candidates.first.end() - 1);
  for (;;) {
    if (cost_of(candidates, selection) <= candidates.budget) use(selection);
    size_t set = selection.size();
    while (set > 0 && ++selection[set - 1] == candidates.first[set]) {
      selection[set - 1] = candidates.first[set - 1];
      --set;
    }
    if (set == 0) return;
  }
}

}  // namespace isobath::allocate
