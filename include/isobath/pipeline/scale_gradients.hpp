#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/comm/tree_sum.hpp>
#include <isobath/pipeline/block_observer.hpp>
#include <isobath/quant/scale_tuner.hpp>
#include <map>
#include <vector>

namespace isobath::pipeline {

/// The quantized linears of one block and what tunes their scales.
using BlockTuners = std::map<model::Projection, quant::ScaleTuner>;

/// Sums ∂L/∂s of the quantized linears of one block over the microbatches of some logical shards, in an order
/// that these fix.
///
/// Memory   the scales of the block in f32, ⌈log₂ shards⌉ + 1 times; ∂L/∂W of one linear [d_out, d_in] f32.
/// Cost     n·d_out·d_in multiply-adds a linear: a third of a backward pass.
class ScaleGradients : public BlockObserver {
 public:
  /// shards: those whose microbatches will pass, ascending, on every replica the same; `tuners` must outlive
  /// this.
  ScaleGradients(const Session& session, const CalibrationSet& calibration, const BlockTuners& tuners,
                 const std::vector<int64_t>& shards);

  void begin(const data::Microbatch& microbatch, int64_t sample) override;
  void observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) override;
  void finish_microbatch(bool is_last_of_shard) override;

  /// ∂L/∂s [R, G] f32 CPU of a quantized linear, on every replica. Collective over the replicas of the stage.
  [[nodiscard]] at::Tensor reduce(model::Projection projection);

 private:
  struct Module {
    comm::TreeSum tree;
    at::Tensor shard;  ///< [R, G] f32, of the shard in work
  };
  const Session& session_;
  const BlockTuners& tuners_;
  std::vector<int64_t> shards_;
  int64_t shard_ = 0;  ///< in work
  std::map<model::Projection, Module> modules_;
};

}  // namespace isobath::pipeline
