#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/model/head.hpp>
#include <isobath/pipeline/measure.hpp>
#include <isobath/pipeline/statistics_observer.hpp>

namespace isobath::pipeline {

/// The loss of a pass and how many gradients a microbatch has of it.
[[nodiscard]] model::LossSpec loss_of(const Session& session, const MeasurePass& pass);

/// Row groups of D and H in a pass: those measured for it, or those that the configuration gives.
[[nodiscard]] BlockRowGroups row_groups_of(const Session& session, const MeasurePass& pass, int64_t block);

/// All statistics of a block; if the pass scores widths, with the weights to perturb and their versions,
/// which are read now.
[[nodiscard]] std::unique_ptr<StatisticsObserver> make_statistics_observer(
    const Session& session, const CalibrationSet& calibration, const MeasurePass& pass, int64_t block,
    const model::BlockWeights& weights);

/// What the two orders of a measure pass (1F1B with resident weights, block after block with streamed ones)
/// do with one microbatch.
class MeasureSteps {
 public:
  MeasureSteps(const Session& session, const CalibrationSet& calibration, const MeasurePass& pass);

  [[nodiscard]] const model::LossSpec& loss() const { return loss_; }
  /// Hidden states at the entrance of the first block. embedding: needed without a source.
  [[nodiscard]] at::Tensor enter(const at::Tensor& embedding, const data::Microbatch& microbatch) const;
  [[nodiscard]] at::Tensor forward(const model::BlockWeights& weights, const at::Tensor& input,
                                   model::BlockActivations* keep = nullptr) const;
  /// ∂L/∂output of the last block, [n_samples, b, T, d_model]; `losses` receives nll, predicted tokens
  /// and KL at the microbatch's index.
  [[nodiscard]] at::Tensor loss_gradient(const model::HeadWeights& head, const at::Tensor& output,
                                         const data::Microbatch& microbatch, at::Tensor& losses) const;
  /// ∂L/∂input of a block for ∂L/∂output, [n_samples, b, T, d_model] both, observed on the way. Activations
  /// that hold only the input are recomputed. closes_shard: the microbatch is the last of its logical shard.
  [[nodiscard]] at::Tensor backward(const model::BlockWeights& weights, model::BlockActivations& activations,
                                    const at::Tensor& gradient, const data::Microbatch& microbatch,
                                    bool closes_shard, BlockObserver& observer) const;

 private:
  const Session& session_;
  const CalibrationSet& calibration_;
  const MeasurePass& pass_;
  model::Rotary rotary_;
  model::LossSpec loss_;
};

/// Whether item i of a replica's microbatches is the last of its logical shard among them.
[[nodiscard]] inline bool closes_shard(std::span<const data::Microbatch> microbatches, size_t i) {
  return i + 1 == microbatches.size() || microbatches[i + 1].shard != microbatches[i].shard;
}

/// The pass with streamed weights: every one of `microbatches` (of this replica, ascending) through one block
/// before the next one is read, forward, then backward.
///
/// Memory   two blocks; the inputs of all blocks for all microbatches (KeptStates); hidden states and
/// gradients of all microbatches; D of one block. Network  the states of all microbatches once a stage
/// border. losses [microbatches of all, 3]: nll, predicted tokens and KL, filled on the last stage.
/// Collective over the session's world.
void sweep_back(const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
                const MeasurePass& pass, const std::vector<data::Microbatch>& microbatches,
                const Observation& observation, at::Tensor& losses);

/// The pass over the microbatches of `probe` alone (whole ones of the calibration set, ascending, on every
/// rank the same), resident or streamed. Collective over the session's world.
/// Returns losses [microbatches of all, 3] f64 as above, zero where this rank computed none.
at::Tensor visit_probe(const Session& session, const CalibrationSet& calibration,
                       const model::WeightStore& weights, const MeasurePass& pass,
                       const std::vector<data::Microbatch>& probe, const Observation& observation);

/// The same for all microbatches of the replica; writes the statistics of each block as soon as it is done.
void measure_streamed(const Session& session, const CalibrationSet& calibration,
                      const model::WeightStore& weights, const MeasurePass& pass, at::Tensor& losses);

}  // namespace isobath::pipeline
