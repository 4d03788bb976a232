#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/pipeline/session.hpp>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// A pass of many items (microbatches, windows) through the blocks, all of them through one block before the
/// next one: how a pass goes when weights are streamed, so that each block is read once. One stage works at a
/// time; between two stages the states of all items travel.
struct Sweep {
  std::string title;  ///< for a stop request and the watchdog
  Range blocks;       ///< visited from begin to end, or the other way round
  bool is_backward = false;
  std::vector<std::vector<int64_t>> shapes{};  ///< of each item's state; compute dtype
  /// One item through one block. Local.
  std::function<at::Tensor(int64_t block, const model::BlockWeights& weights, int64_t item,
                           const at::Tensor& state)>
      step{};
  /// On the ranks of the block's stage before its first step and after its last; may communicate within the
  /// stage, not over the world. Either may be empty.
  std::function<void(int64_t block, const model::BlockWeights& weights)> begin_block{};
  std::function<void(int64_t block)> end_block{};
};

/// states: one an item on the ranks of the stage that works first, ignored elsewhere. Returns what became of
/// them on the ranks of the stage that works last, nothing elsewhere.
///
/// Memory   the states, and two blocks of a streamed store. Network  the states once a stage border.
/// Collective over the session's world. Throws AgreedFailure when a block cannot be read or `end_block`
/// fails, StopRequested after a block when a stop was asked for.
[[nodiscard]] std::vector<at::Tensor> sweep(const Session& session, const model::WeightStore& weights,
                                            const Sweep& pass, std::vector<at::Tensor> states);

}  // namespace isobath::pipeline
