#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <bit>
#include <isobath/comm/tree_sum.hpp>
#include <isobath/core/partition.hpp>
#include <random>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

constexpr int64_t kElements = 33;

/// Values of very different size and sign, so that nearly every order of additions gives other bits.
at::Tensor shard_total(int64_t shard) {
  std::mt19937 engine(static_cast<uint32_t>(shard + 1));
  std::uniform_real_distribution<float> mantissa(-1, 1);
  std::uniform_int_distribution<int> exponent(-12, 12);
  at::Tensor total = at::empty({kElements});
  for (int64_t i = 0; i < kElements; ++i) total[i] = std::ldexp(mantissa(engine), exponent(engine));
  return total;
}

/// The tree of the header, written down directly: [begin, begin + width) with width a power of two.
at::Tensor reference_sum(int64_t begin, int64_t width, int64_t n_shards) {
  if (width == 1) return shard_total(begin);
  const int64_t half = width / 2;
  const at::Tensor left = reference_sum(begin, half, n_shards);
  return begin + half < n_shards ? left + reference_sum(begin + half, half, n_shards) : left;
}

at::Tensor reference_sum(int64_t n_shards) {
  return reference_sum(0, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n_shards))), n_shards);
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return at::equal(a.view(at::kInt), b.view(at::kInt));
}

void expect_reference_bits(const std::vector<int>& owners, int root, bool descending = false) {
  const auto n_shards = static_cast<int64_t>(owners.size());
  TreeSum sum(owners, world().rank());
  for (int64_t i = 0; i < n_shards; ++i) {
    const int64_t shard = descending ? n_shards - 1 - i : i;
    if (owners[static_cast<size_t>(shard)] == world().rank()) sum.add(shard, shard_total(shard));
  }
  const at::Tensor total = sum.reduce_to(root, world(), 100);
  EXPECT_EQ(total.defined(), world().rank() == root);
  if (!total.defined()) return;
  EXPECT_EQ(total.sizes(), at::IntArrayRef{kElements});
  EXPECT_TRUE(same_bits(total, reference_sum(n_shards))) << fmt::format("owners {}", fmt::join(owners, " "));
}

/// Calls visit(owners) for every way of cutting n_shards into `n_ranks` contiguous shares, empty ones
/// included.
template <class Visit>
void for_every_distribution(int64_t n_shards, int n_ranks, Visit&& visit, std::vector<int> owners = {}) {
  if (static_cast<int64_t>(owners.size()) == n_shards) return visit(owners);
  for (int rank = owners.empty() ? 0 : owners.back(); rank < n_ranks; ++rank) {
    std::vector<int> longer = owners;
    longer.push_back(rank);
    for_every_distribution(n_shards, n_ranks, visit, longer);
  }
}

TEST(TreeSum, HasTheSameBitsForEveryDistributionOfFewShards) {
  for (int64_t n_shards = 1; n_shards <= 7; ++n_shards) {
    int turn = 0;
    for_every_distribution(n_shards, world().size(), [&](const std::vector<int>& owners) {
      expect_reference_bits(owners, turn++ % world().size());
    });
  }
}

TEST(TreeSum, HasTheSameBitsForBalancedSharesOfManyShards) {
  for (int64_t n_shards = 8; n_shards <= 40; ++n_shards) {
    std::vector<int> owners;
    for (int64_t s = 0; s < n_shards; ++s)
      owners.push_back(static_cast<int>(owner_of(s, n_shards, world().size())));
    expect_reference_bits(owners, world().size() - 1);
  }
}

TEST(TreeSum, TheOrderOfAddingDoesNotMatter) {
  for (const int64_t n_shards : {5, 16, 21}) {
    std::vector<int> owners;
    for (int64_t s = 0; s < n_shards; ++s)
      owners.push_back(static_cast<int>(owner_of(s, n_shards, world().size())));
    expect_reference_bits(owners, 0, true);
  }
}

TEST(TreeSum, ALeftToRightSumHasOtherBits) {
  // Otherwise the tests above would prove nothing.
  at::Tensor plain = shard_total(0);
  for (int64_t s = 1; s < 16; ++s) plain = plain + shard_total(s);
  EXPECT_FALSE(same_bits(plain, reference_sum(16)));
  EXPECT_TRUE(at::allclose(plain, reference_sum(16), 1e-3, 1e-1));  // but it is the same sum
}

TEST(TreeSum, TakesTheMaximumAndTheMinimum) {
  std::vector<int> owners;
  for (int64_t s = 0; s < 11; ++s) owners.push_back(static_cast<int>(owner_of(s, 11, world().size())));
  TreeSum largest(owners, world().rank(), Reduce::max), smallest(owners, world().rank(), Reduce::min);
  at::Tensor expected_max = shard_total(0), expected_min = shard_total(0);
  for (int64_t s = 0; s < 11; ++s) {
    expected_max = at::maximum(expected_max, shard_total(s));
    expected_min = at::minimum(expected_min, shard_total(s));
    if (owners[static_cast<size_t>(s)] != world().rank()) continue;
    largest.add(s, shard_total(s));
    smallest.add(s, shard_total(s));
  }
  const at::Tensor max = largest.reduce_to(0, world()), min = smallest.reduce_to(0, world());
  if (world().rank() == 0) {
    EXPECT_TRUE(at::equal(max, expected_max));
    EXPECT_TRUE(at::equal(min, expected_min));
  }
}

TEST(TreeSum, ARootWithoutShardsLearnsShapeAndDtype) {
  const int last = world().size() - 1;
  TreeSum sum({0, 0}, world().rank());
  if (world().rank() == 0) {
    sum.add(0, at::full({2, 3}, 1.5, at::kDouble));
    sum.add(1, at::full({2, 3}, 2.0, at::kDouble));
  }
  const at::Tensor total = sum.reduce_to(last, world(), 5);
  if (world().rank() == last) {
    EXPECT_TRUE(at::equal(total, at::full({2, 3}, 3.5, at::kDouble)));
  }
}

TEST(TreeSum, IsEmptyAfterwardsAndCanBeUsedAgain) {
  std::vector<int> owners(4, world().size() - 1);
  TreeSum sum(owners, world().rank());
  for (int round = 0; round < 2; ++round) {
    for (int64_t s = 0; s < 4 && world().rank() == owners[0]; ++s) sum.add(s, at::ones({3}));
    const at::Tensor total = sum.reduce_to(0, world());
    if (world().rank() == 0) {
      EXPECT_TRUE(at::equal(total, at::full({3}, 4.0f)));
    }
  }
}

TEST(TreeSum, BreachesOfTheContractAreRefused) {
  EXPECT_THROW(TreeSum({1, 0}, 0), InternalError);
  EXPECT_THROW(TreeSum({}, 0), InternalError);
  TreeSum sum({0, 0, 1}, 0);
  sum.add(0, at::ones({2}));
  EXPECT_THROW(sum.add(0, at::ones({2})), InternalError);
  EXPECT_THROW(sum.add(1, at::ones({3})), InternalError);
  EXPECT_THROW(sum.add(2, at::ones({2})), InternalError);
  EXPECT_THROW(sum.add(3, at::ones({2})), InternalError);
  TreeSum incomplete({0, 0}, world().rank());
  if (world().rank() == 0) {
    EXPECT_THROW(static_cast<void>(incomplete.reduce_to(0, world())), InternalError);
  }
}

}  // namespace
}  // namespace isobath::comm
