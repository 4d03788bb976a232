#pragma once
#include <cstdint>

namespace isobath::pipeline {

/// When a pass over blocks (or steps of the tuning) saves its state: after every so many blocks, or
/// (every_blocks 0: auto) after the first block behind which saving costs no more than kShare of the time
/// since the last time. Pure; the ranks agree on what the first one finds.
class CheckpointPace {
 public:
  /// Of the time between two saved states, what saving one may cost.
  static constexpr double kShare = 0.02;
  /// What a disk takes until the first state was saved.
  static constexpr double kAssumedBytesPerSecond = 200e6;

  /// state_bytes: of one saved state, all ranks.
  CheckpointPace(int64_t every_blocks, double state_bytes)
      : every_blocks_(every_blocks), cost_s_(state_bytes / kAssumedBytesPerSecond) {}

  /// blocks_done: since the beginning of the pass. since_s: since the last saved state, or the start.
  [[nodiscard]] bool is_due(int64_t blocks_done, double since_s) const {
    return every_blocks_ > 0 ? blocks_done % every_blocks_ == 0 : cost_s_ <= kShare * since_s;
  }
  /// Takes note of what saving a state took.
  void saved(double seconds) { cost_s_ = seconds; }

 private:
  int64_t every_blocks_;
  double cost_s_;
};

}  // namespace isobath::pipeline
