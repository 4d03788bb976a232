#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/model/block.hpp>
#include <isobath/pipeline/session.hpp>
#include <memory>
#include <utility>

namespace isobath::pipeline {

/// Sees the seven linears of one block on one rank during the backward passes of its replica's microbatches.
class BlockObserver {
 public:
  BlockObserver() = default;
  BlockObserver(const BlockObserver&) = delete;
  BlockObserver& operator=(const BlockObserver&) = delete;
  virtual ~BlockObserver() = default;

  /// What the backward passes that follow belong to: one of a microbatch's gradients, from 0 on.
  virtual void begin(const data::Microbatch& microbatch, int64_t sample) = 0;
  /// A linear's input [b, T, d_in] and output gradient [b, T, d_out] in one backward pass.
  virtual void observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) = 0;
  /// Closes the microbatch after its last sample; closes its logical shard when `is_last_of_shard`.
  virtual void finish_microbatch(bool is_last_of_shard) = 0;
};

/// What a backward pass looks for: the observer of each of a stage's blocks, and what becomes of it.
struct Observation {
  /// From the block's number and weights, before the pass, or with streamed weights when they were read.
  std::function<std::unique_ptr<BlockObserver>(int64_t block, const model::BlockWeights& weights)> make;
  /// When all microbatches have gone back through the block; on all replicas of a stage in the same order, so
  /// that it may communicate within the stage.
  std::function<void(int64_t block, BlockObserver& observer)> take;

  /// make: returns a unique_ptr to an Observer; take: gets it back as what it is.
  template <class Observer, class Make, class Take>
  static Observation of(Make make, Take take) {
    return {std::move(make), [take = std::move(take)](int64_t block, BlockObserver& observer) {
              take(block, static_cast<Observer&>(observer));
            }};
  }
};

/// The replica on which what the replicas of a stage saw of a block meets: blocks take turns.
[[nodiscard]] inline int root_of_block(const Session& session, int64_t block) {
  return static_cast<int>(block % session.grid->shape().replicas);
}

}  // namespace isobath::pipeline
