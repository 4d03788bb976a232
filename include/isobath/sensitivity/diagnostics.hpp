#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace isobath::sensitivity {

/// Ranks 1 … n of values, equal values sharing the mean of theirs (scipy.stats.rankdata).
[[nodiscard]] std::vector<double> ranks_of(std::span<const double> values);

/// Spearman's rank correlation: Pearson's of the ranks. 0 when one side is constant or has less than two
/// values. Precondition: equal sizes.
[[nodiscard]] double rank_correlation(std::span<const double> a, std::span<const double> b);

/// Share of the k largest of `predicted` that are among the k largest of `measured`; k is lowered to the
/// number of values; of equal values the first counts as larger. 1 for no values. Precondition: equal sizes.
[[nodiscard]] double precision_at(std::span<const double> predicted, std::span<const double> measured,
                                  int64_t k);

/// Places of the k largest values, largest first; of equal ones the first is larger.
[[nodiscard]] std::vector<int64_t> largest(std::span<const double> values, int64_t k);

}  // namespace isobath::sensitivity
