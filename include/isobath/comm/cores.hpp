#pragma once
#include <isobath/comm/communicator.hpp>

namespace isobath::comm {

/// Cores of the ranks of one node, from the affinity masks that their launcher gave them.
struct NodeCores {
  int usable = 0;    ///< in the mask of at least one rank
  int per_rank = 0;  ///< of the rank that has least: its mask, shared evenly with those whose masks meet it
  int available =
      0;  ///< that mpirun may use, which binds ranks to some of them; `usable` with other launchers
};

/// Collective over `node`, the ranks of one node; the same on all of them.
[[nodiscard]] NodeCores cores_of(const Communicator& node);

}  // namespace isobath::comm
