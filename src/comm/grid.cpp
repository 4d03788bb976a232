#include <isobath/comm/grid.hpp>

namespace isobath::comm {
namespace {

Communicator checked_duplicate(const Communicator& world, GridShape shape) {
  ISOBATH_CHECK(shape.stages > 0 && shape.replicas > 0 && shape.stages * shape.replicas == world.size(),
                "{} stages x {} replicas do not make {} ranks", shape.stages, shape.replicas, world.size());
  return world.duplicate();
}

}  // namespace

Grid::Grid(const Communicator& world, GridShape shape)
    : shape_(shape),
      world_(checked_duplicate(world, shape)),
      pipeline_(world_.split(replica(), stage())),
      replicas_(world_.split(stage(), replica())) {}

int Grid::stage() const {
  return world_.rank() % shape_.stages;
}
int Grid::replica() const {
  return world_.rank() / shape_.stages;
}

int Grid::world_rank(int stage, int replica) const {
  ISOBATH_CHECK(0 <= stage && stage < shape_.stages && 0 <= replica && replica < shape_.replicas,
                "stage {} replica {} of {} x {}", stage, replica, shape_.stages, shape_.replicas);
  return replica * shape_.stages + stage;
}

}  // namespace isobath::comm
