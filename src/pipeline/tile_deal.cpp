#include <algorithm>
#include <isobath/pipeline/tile_deal.hpp>
#include <numeric>
#include <tuple>

namespace isobath::pipeline {

std::vector<TileShare> deal_tiles(const std::vector<TileWork>& modules,
                                  const std::vector<double>& factorization, int rank) {
  const size_t n_ranks = factorization.size();
  std::vector<double> before = factorization, behind(n_ranks, 0.0);
  std::vector<TileShare> shares;
  for (const TileWork& module : modules) {
    std::vector<size_t> least_first(n_ranks);
    std::iota(least_first.begin(), least_first.end(), size_t{0});
    std::ranges::stable_sort(least_first, {}, [&](size_t r) { return behind[r]; });
    TileShare& share = shares.emplace_back();
    for (size_t part = 0; part < n_ranks; ++part) {
      const size_t r = least_first[part];
      const Range tiles =
          partition(module.n_tiles, static_cast<int64_t>(n_ranks), static_cast<int64_t>(part));
      behind[r] += module.solve * static_cast<double>(tiles.size());
      if (static_cast<int>(r) == rank) share.solved = tiles;
    }
  }
  double last_before = std::ranges::max(before), last_behind = std::ranges::max(behind);
  for (size_t m = 0; m < modules.size(); ++m) {
    const TileWork& module = modules[m];
    for (int64_t tile = 0; tile < module.n_tiles; tile += module.every) {
      // The end of everything, then how much the rank that is chosen has to do by then.
      std::tuple<double, double> best{};
      size_t chosen = 0;
      bool is_early = true;
      for (size_t r = 0; r < n_ranks; ++r)
        for (const bool early : {true, false}) {
          const double own_before = before[r] + (early ? module.round : 0);
          const double own_behind = behind[r] + (early ? 0 : module.round) + module.product;
          const std::tuple end{std::max(last_before, own_before) + std::max(last_behind, own_behind),
                               own_before + own_behind};
          if ((r > 0 || !early) && end >= best) continue;
          best = end;
          chosen = r;
          is_early = early;
        }
      before[chosen] += is_early ? module.round : 0;
      behind[chosen] += (is_early ? 0 : module.round) + module.product;
      last_before = std::max(last_before, before[chosen]);
      last_behind = std::max(last_behind, behind[chosen]);
      if (static_cast<int>(chosen) == rank) (is_early ? shares[m].early : shares[m].late).push_back(tile);
    }
  }
  return shares;
}

}  // namespace isobath::pipeline
