#pragma once
#include <isobath/comm/communicator.hpp>

namespace isobath::comm {

/// Cores of the ranks of one node, from the affinity masks that their launcher gave them.
struct NodeCores {
  /// In the mask of at least one rank.
  int usable = 0;
  /// Of the rank that has least: its mask, shared evenly with those whose masks meet it.
  int per_rank = 0;
  /// Those that mpirun may use, which binds ranks to some of them; with other launchers `usable`.
  int available = 0;
};

/// Collective over `node`, the ranks of one node; the same on all of them.
[[nodiscard]] NodeCores cores_of(const Communicator& node);

}  // namespace isobath::comm
