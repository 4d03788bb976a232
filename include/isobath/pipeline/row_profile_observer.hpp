#pragma once
#include <array>
#include <isobath/comm/tree_sum.hpp>
#include <isobath/pipeline/block_observer.hpp>
#include <vector>

namespace isobath::pipeline {

/// Gradient profiles of the rows of one block's linears (sensitivity::row_profiles), summed over some
/// microbatches in an order that these fix.
///
/// Memory   the profiles of the block in f32, ⌈log₂ microbatches⌉ + 1 times.
class RowProfileObserver : public BlockObserver {
 public:
  /// microbatches: those that will pass, ascending, on every replica the same.
  RowProfileObserver(const Session& session, const CalibrationSet& calibration, int64_t block,
                     const std::vector<data::Microbatch>& microbatches);

  void begin(const data::Microbatch& microbatch, int64_t sample) override;
  void observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) override;
  void finish_microbatch(bool is_last_of_shard) override;

  /// Collective over the replicas of this stage: the profiles of a linear's rows, [d_out,
  /// sensitivity::kProfileLength] f32, on the block's root; an undefined tensor elsewhere.
  [[nodiscard]] at::Tensor reduce(model::Projection projection);

 private:
  struct Module {
    comm::TreeSum tree;   // its leaves the microbatches
    at::Tensor profiles;  // of this microbatch
  };
  const Session& session_;
  int root_;
  std::vector<int64_t> leaves_;  // indices of the microbatches
  data::Microbatch microbatch_{};
  std::vector<Module> modules_;
};

}  // namespace isobath::pipeline
