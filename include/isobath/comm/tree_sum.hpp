#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/comm/communicator.hpp>
#include <map>
#include <vector>

namespace isobath::comm {

/// Sums one tensor per logical shard along one fixed binary tree over the shard indices, so that the result
/// has the same bits for every number of ranks and every distribution of the shards.
///
/// Tree     node (l, i) = node (l−1, 2i) + node (l−1, 2i+1); leaf (0, s) is shard s; a right child whose
/// first shard
///          lies beyond the last one is absent and its sibling passes up unchanged.
/// Memory   at most ⌈log₂ n_shards⌉ + 1 partial sums on a rank that owns contiguous shards and adds them in
/// order.
class TreeSum {
 public:
  /// owners[s] is the rank that adds shard s. Contiguous owners in ascending order are expected (checked).
  TreeSum(std::vector<int> owners, int rank, Reduce operation = Reduce::sum);

  /// Adds the total of `shard`, which this rank owns; combines at once whatever the tree allows, where the
  /// tensors are. Local. The tensor is taken over and may be changed in place. All shards have one shape,
  /// dtype and device; contiguous.
  void add(int64_t shard, at::Tensor total);

  /// Collective over `comm`, the communicator the owners are ranks of: combines the partial sums of the ranks
  /// by point-to-point messages and leaves the total on the host of `root`; an undefined tensor elsewhere.
  /// Empty afterwards.
  ///
  /// tag      the first of ⌈log₂ n_shards⌉ + 2 tags: level l uses tag + l, the move to `root` the last two.
  [[nodiscard]] at::Tensor reduce_to(int root, const Communicator& comm, int tag = 0);

 private:
  struct Node {
    int level;
    int64_t index;
    auto operator<=>(const Node&) const = default;
  };
  void combine_upwards(Node node);
  [[nodiscard]] bool exists(Node node) const;
  /// Where a node is combined when the total goes to `root`: there if it owns one of the node's shards, else
  /// on the owner of the first.
  [[nodiscard]] int holder(Node node, int root) const;

  std::vector<int> owners_;
  int rank_;
  Reduce operation_;
  std::map<Node, at::Tensor> partial_;
  std::vector<bool> added_;
};

}  // namespace isobath::comm
