#pragma once
#include <filesystem>
#include <isobath/checkpoint/run_state.hpp>
#include <isobath/pipeline/hidden_streams.hpp>
#include <isobath/pipeline/measure.hpp>
#include <map>
#include <optional>

namespace isobath::pipeline {

/// Measures D again behind the blocks quantized so far, as `quantization.reestimate` says.
///
/// Before block b the hidden states of the quantized prefix enter the pipeline on the stage that holds b and
/// go on through the original blocks: a backward calibration pass over blocks [b, B). Policy drift first
/// makes that pass with a few sequences and compares. `track` sends these sequences forward behind every
/// block, for their divergence.
///
/// Cost     a refresh before block b: (B − b)/B of the measure pass; a comparison: that times the probe's
///          share of the sequences; tracking: B/2 forward passes of the probe in all, and B times its head.
///          Loss kl: one forward pass of the original model, once a job; tracking alone: of the probe.
/// Memory   loss kl: n_local · T · d_model in compute dtype on the last stage; tracking alone: the probe's
/// share.
class Reestimation {
 public:
  /// run: the run directory. statistics: D of the unquantized model.
  Reestimation(const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
               std::filesystem::path statistics, std::filesystem::path run, report::EventLog& events)
      : session_(session),
        calibration_(calibration),
        weights_(weights),
        statistics_(std::move(statistics)),
        run_(std::move(run)),
        events_(events) {}

  /// Does what the policy asks for before `block`, and notes it in `state`: sensitivity_from_block and
  /// reestimations. Collective over the session's world. Throws what `measure` throws.
  void before_block(int64_t block, const HiddenStreams& streams, checkpoint::RunState& state);

  /// `track`: nll, and KL to the original, of the model whose blocks before `block` are quantized (n_blocks:
  /// all of them), on the probe; else nothing. Collective over the session's world. Throws what `measure`
  /// throws.
  [[nodiscard]] std::optional<PassLoss> loss_before(int64_t block, const HiddenStreams& streams);

  /// The directory of the statistics in use.
  [[nodiscard]] std::filesystem::path statistics(const checkpoint::RunState& state) const {
    return state.sensitivity_from_block < 0 ? statistics_ : directory_of(state.sensitivity_from_block);
  }

 private:
  [[nodiscard]] std::filesystem::path directory_of(int64_t block) const;
  [[nodiscard]] std::vector<data::Microbatch> probe() const;
  [[nodiscard]] MeasurePass pass_from(int64_t block, const std::string& title, const std::string& loss,
                                      const HiddenStreams& streams);
  /// With the loss of `quantization.reestimate`.
  [[nodiscard]] MeasurePass measurement_from(int64_t block, const std::string& title,
                                             const HiddenStreams& streams);
  /// Starts sending the hidden states of `microbatches` that this rank holds to the ranks that feed the
  /// pipeline.
  void send_hidden(int64_t block, const std::vector<data::Microbatch>& microbatches,
                   const HiddenStreams& streams);
  void wait_for_sends();

  const Session& session_;
  const CalibrationSet& calibration_;
  const model::WeightStore& weights_;
  std::filesystem::path statistics_, run_;
  report::EventLog& events_;
  std::optional<std::map<int64_t, at::Tensor>> original_;  // loss kl: last hidden states of this replica
  std::vector<std::pair<at::Tensor, comm::Request>> leaving_;
};

}  // namespace isobath::pipeline
