#include <gtest/gtest.h>

#include <algorithm>
#include <isobath/pipeline/tile_deal.hpp>
#include <set>

namespace isobath::pipeline {
namespace {

struct Load {
  double before = 0, behind = 0;
};

Load load_of(const std::vector<TileWork>& modules, const std::vector<double>& factorization, int rank) {
  Load load{.before = factorization[static_cast<size_t>(rank)]};
  const std::vector<TileShare> shares = deal_tiles(modules, factorization, rank);
  for (size_t m = 0; m < modules.size(); ++m) {
    const auto early = static_cast<double>(shares[m].early.size()),
               late = static_cast<double>(shares[m].late.size());
    load.before += early * modules[m].round;
    load.behind += static_cast<double>(shares[m].solved.size()) * modules[m].solve + late * modules[m].round +
                   (early + late) * modules[m].product;
  }
  return load;
}

TEST(DealTiles, GivesEachTileToOneRank) {
  const std::vector<TileWork> modules{{9, 1, 3, 2, 1}, {3, 1, 3, 2, 1}, {40, 16, 5, 4, 1}};
  for (int n_ranks = 1; n_ranks <= 12; ++n_ranks) {
    std::vector<std::multiset<int64_t>> solved(modules.size()), rounded(modules.size());
    std::vector<double> factorization(static_cast<size_t>(n_ranks), 0.0);
    factorization[0] = 7;
    for (int rank = 0; rank < n_ranks; ++rank) {
      const std::vector<TileShare> shares = deal_tiles(modules, factorization, rank);
      ASSERT_EQ(shares.size(), modules.size());
      for (size_t m = 0; m < modules.size(); ++m) {
        for (int64_t tile = shares[m].solved.begin; tile < shares[m].solved.end; ++tile)
          solved[m].insert(tile);
        rounded[m].insert(shares[m].early.begin(), shares[m].early.end());
        rounded[m].insert(shares[m].late.begin(), shares[m].late.end());
      }
    }
    for (size_t m = 0; m < modules.size(); ++m) {
      std::multiset<int64_t> all, sampled;
      for (int64_t tile = 0; tile < modules[m].n_tiles; ++tile) all.insert(tile);
      for (int64_t tile = 0; tile < modules[m].n_tiles; tile += modules[m].every) sampled.insert(tile);
      EXPECT_EQ(solved[m], all) << n_ranks << " ranks, module " << m;
      EXPECT_EQ(rounded[m], sampled) << n_ranks << " ranks, module " << m;
    }
  }
}

TEST(DealTiles, GivesTheLargerShareOfTheNextModuleToAnotherRank) {
  // 9, 3 and 3 tiles over two ranks: 5 + 1 + 2 and 4 + 2 + 1.
  const std::vector<TileWork> modules{{9, 100, 1, 0, 0}, {3, 100, 1, 0, 0}, {3, 100, 1, 0, 0}};
  EXPECT_EQ(load_of(modules, {0, 0}, 0).behind, 8);
  EXPECT_EQ(load_of(modules, {0, 0}, 1).behind, 7);
}

TEST(DealTiles, LetsOthersRoundWhileOneFactorizes) {
  // Rank 0 factorizes for 6; all work is 42.
  const std::vector<TileWork> modules{{6, 1, 4, 2, 0}};
  const Load root = load_of(modules, {6, 0}, 0), other = load_of(modules, {6, 0}, 1);
  EXPECT_GE(other.before, 6);
  EXPECT_LE(std::max(root.before, other.before) + std::max(root.behind, other.behind), 22);
}

TEST(DealTiles, EvensOutUnequalSharesOfCodes) {
  const std::vector<TileWork> modules{{9, 1, 2, 1, 0}};
  const Load first = load_of(modules, {0, 0}, 0), second = load_of(modules, {0, 0}, 1);
  EXPECT_LE(std::max(first.before, second.before) + std::max(first.behind, second.behind), 14);  // of 27
}

}  // namespace
}  // namespace isobath::pipeline
