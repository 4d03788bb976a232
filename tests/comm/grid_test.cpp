#include <gtest/gtest.h>

#include <isobath/comm/grid.hpp>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

TEST(Grid, PlacesTheStagesOfAReplicaNextToEachOther) {
  for (int stages = 1; stages <= world().size(); ++stages) {
    if (world().size() % stages != 0) continue;
    const GridShape shape{stages, world().size() / stages};
    const Grid grid(world(), shape);
    EXPECT_EQ(grid.shape(), shape);
    EXPECT_EQ(grid.world_rank(grid.stage(), grid.replica()), world().rank());
    EXPECT_EQ(grid.world().rank(), world().rank());
    EXPECT_EQ(grid.pipeline().rank(), grid.stage());
    EXPECT_EQ(grid.pipeline().size(), shape.stages);
    EXPECT_EQ(grid.replicas().rank(), grid.replica());
    EXPECT_EQ(grid.replicas().size(), shape.replicas);
    // The ranks of a pipeline are consecutive in the world; those of a stage are `stages` apart.
    EXPECT_EQ(grid.pipeline().all_reduce(world().rank(), Reduce::min), grid.replica() * stages);
    EXPECT_EQ(grid.pipeline().all_reduce(world().rank(), Reduce::max), grid.replica() * stages + stages - 1);
    EXPECT_EQ(grid.replicas().all_reduce(world().rank(), Reduce::min), grid.stage());
  }
}

TEST(Grid, NumbersTheRanksStageFirst) {
  if (world().size() != 4) GTEST_SKIP() << "written for 4 ranks";
  const Grid grid(world(), {.stages = 2, .replicas = 2});
  const int stages[] = {0, 1, 0, 1}, replicas[] = {0, 0, 1, 1};
  EXPECT_EQ(grid.stage(), stages[world().rank()]);
  EXPECT_EQ(grid.replica(), replicas[world().rank()]);
  EXPECT_EQ(grid.world_rank(1, 0), 1);
  EXPECT_EQ(grid.world_rank(0, 1), 2);
}

TEST(Grid, AShapeThatDoesNotFitIsRefused) {
  EXPECT_THROW(Grid(world(), {.stages = world().size() + 1, .replicas = 1}), InternalError);
  EXPECT_THROW(Grid(world(), {.stages = 0, .replicas = 0}), InternalError);
}

}  // namespace
}  // namespace isobath::comm
