#pragma once
#include <filesystem>
#include <functional>
#include <isobath/pipeline/session.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <map>
#include <optional>
#include <string>

namespace isobath::pipeline {

/// Hidden states of a microbatch, [b, T, d_model] in compute dtype on the session's device; asked for once a
/// microbatch, in order.
using HiddenSource = std::function<at::Tensor(const data::Microbatch&)>;

/// A backward calibration pass over blocks [first_block, n_blocks).
struct MeasurePass {
  std::string title = "measure";  ///< of the progress line
  int64_t first_block = 0;        ///< n_blocks: the head alone
  bool is_forward_only = false;   ///< for the loss: no gradient goes back, nothing is observed
  /// Enter first_block, on its stage; empty: the embedded tokens (first_block is 0).
  HiddenSource source = {};
  std::string loss = {};            ///< nll | fisher | kl; empty: sensitivity.loss
  HiddenSource original = {};       ///< kl: the original model's last hidden states, on the last stage
  std::filesystem::path directory;  ///< receives one statistics file a block
  bool with_perturbations = false;  ///< also scores the widths of sensitivity.gram.bits
  /// What these widths make of the weights, one a width (open_perturbed_versions); empty: rounded to nearest.
  std::vector<std::shared_ptr<const model::CheckpointReader>> perturbed_versions = {};
  /// Measured row groups of this stage's blocks, where they are not given by the configuration.
  std::map<int64_t, BlockRowGroups> row_groups = {};
};

struct PassLoss {
  double nll_per_token = 0;            ///< of the data labels, nats
  std::optional<double> kl_per_token;  ///< loss kl: of the original to the model as it is now, nats
  int64_t n_tokens = 0;                ///< predicted ones
};
struct MeasureResult {
  PassLoss loss;  ///< on the calibration set
  double wall_s = 0;
};

/// Forward and backward over the calibration set with frozen weights, pipelined (1F1B), or with streamed
/// weights block after block: leaves D of every
/// token, module and row group, Σx², max|x| and α of [AS 5] and [AS 6], and on request H, one file a block,
/// the same bytes for any grid.
///
/// Memory, network with streamed weights: measure_streamed (pipeline/measure_steps.hpp). Else:
/// Memory   a stage keeps one input a block and microbatch in flight (stages − stage of them) and recomputes
/// the block in the backward;
///          D of its blocks for its replica's sequences; one partial sum a tree level of each statistic.
/// Network  per microbatch and stage border: one hidden state forward, n_samples gradients back; at the end
/// per block one tree reduction
///          of the channel statistics over the replicas and D to one of them.
/// Collective over the session's world. Throws StopRequested on every rank when a stop was asked for;
/// NumericError for non-finite values (module, sequence, token).
MeasureResult measure(const Session& session, const CalibrationSet& calibration,
                      const model::WeightStore& weights, const MeasurePass& pass, report::EventLog& events);

/// D of blocks [first_block, n_blocks) for the sequences of `probe` alone, by the same pass; nothing is
/// written. `probe`: whole microbatches of the calibration set, ascending.
///
/// Returns  this stage's blocks -> seven tensors [n_probe_sequences, T, row_groups] f32 in the order of
///          `probe`, on every replica; the same bits for any grid.
/// Cost     the probe's share of `measure`, less the other statistics. Collective over the session's world.
[[nodiscard]] std::map<int64_t, std::array<at::Tensor, model::kProjections>> measure_token_weights(
    const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
    const MeasurePass& pass, const std::vector<data::Microbatch>& probe);

/// The loss on the sequences of `probe` alone; `pass` need not be forward only. The same bits for any grid.
/// Cost: forward only, a third of the probe's share of `measure`. Collective over the session's world.
[[nodiscard]] PassLoss measure_loss(const Session& session, const CalibrationSet& calibration,
                                    const model::WeightStore& weights, const MeasurePass& pass,
                                    const std::vector<data::Microbatch>& probe);

/// Identity of the statistics a run needs: model, tokens, loss … (what `sensitivity.reuse` compares).
/// loss: of the pass; empty: sensitivity.loss.
[[nodiscard]] StatisticsHeader statistics_header(const Session& session, const CalibrationSet& calibration,
                                                 const std::string& loss = {});

}  // namespace isobath::pipeline
