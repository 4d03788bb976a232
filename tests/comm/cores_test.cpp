#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <isobath/comm/cores.hpp>
#include <vector>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

/// Changes which cores this process may use, and gives them back.
class Cores : public ::testing::Test {
 protected:
  Cores() {
    CPU_ZERO(&before_);
    EXPECT_EQ(sched_getaffinity(0, sizeof before_, &before_), 0);
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &before_)) cores_.push_back(core);
  }
  ~Cores() override { sched_setaffinity(0, sizeof before_, &before_); }

  void bind_to(int core) const {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(core, &mask);
    ASSERT_EQ(sched_setaffinity(0, sizeof mask, &mask), 0);
  }
  [[nodiscard]] int n() const { return static_cast<int>(cores_.size()); }

  cpu_set_t before_;
  std::vector<int> cores_;  // that the test may use
};

TEST_F(Cores, AreSharedByRanksThatMayUseAll) {
  const NodeCores found = cores_of(world().node());
  EXPECT_EQ(found.usable, n());
  EXPECT_EQ(found.per_rank, n() / world().size());
  EXPECT_GE(found.available, n());
}

TEST_F(Cores, AreThoseThatEachRankIsBoundTo) {
  bind_to(cores_[static_cast<size_t>(world().rank() % n())]);
  const NodeCores found = cores_of(world().node());
  EXPECT_EQ(found.usable, std::min(n(), world().size()));
  // With more ranks than cores some share one: nobody can count on a core of its own.
  EXPECT_EQ(found.per_rank, world().size() <= n() ? 1 : 0);
  EXPECT_GE(found.available, found.usable);
}

TEST_F(Cores, OfTheRankThatHasLeastCount) {
  // The first rank is bound to a core that the others may use as well.
  if (world().rank() == 0) bind_to(cores_[0]);
  const NodeCores found = cores_of(world().node());
  EXPECT_EQ(found.usable, world().size() == 1 ? 1 : n());
  EXPECT_EQ(found.per_rank, 1 / world().size());
}

}  // namespace
}  // namespace isobath::comm
