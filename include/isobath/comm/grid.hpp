#pragma once
#include <isobath/comm/communicator.hpp>

namespace isobath::comm {

struct GridShape {
  int stages = 1;
  int replicas = 1;
  bool operator==(const GridShape&) const = default;
};

/// The ranks as stages (pipeline) × replicas (data): world rank = replica * stages + stage, so that the
/// neighbours of a pipeline are neighbours in rank and, with block placement, on one node.
class Grid {
 public:
  /// Collective over `world`. Precondition: stages * replicas == world.size().
  Grid(const Communicator& world, GridShape shape);

  [[nodiscard]] GridShape shape() const { return shape_; }
  [[nodiscard]] int stage() const;
  [[nodiscard]] int replica() const;
  [[nodiscard]] int world_rank(int stage, int replica) const;
  [[nodiscard]] const Communicator& world() const { return world_; }
  /// The ranks of this rank's replica; rank in it == stage.
  [[nodiscard]] const Communicator& pipeline() const { return pipeline_; }
  /// The ranks of this rank's stage; rank in it == replica.
  [[nodiscard]] const Communicator& replicas() const { return replicas_; }

 private:
  GridShape shape_;
  Communicator world_;
  Communicator pipeline_;
  Communicator replicas_;
};

}  // namespace isobath::comm
