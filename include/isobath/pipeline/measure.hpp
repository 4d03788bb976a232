#pragma once
#include <filesystem>
#include <functional>
#include <isobath/pipeline/session.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <string>

namespace isobath::pipeline {

/// Hidden states that enter `first_block`, [b, T, d_model] in compute dtype on the session's device; asked
/// for on the ranks of the stage that holds that block, once a microbatch, in order.
using HiddenSource = std::function<at::Tensor(const data::Microbatch&)>;

/// A backward calibration pass over blocks [first_block, n_blocks).
struct MeasurePass {
  std::string title = "measure";  ///< of the progress line
  int64_t first_block = 0;
  HiddenSource source;              ///< empty: the embedded tokens (needs first_block == 0)
  std::filesystem::path directory;  ///< receives one statistics file a block
  bool with_perturbations = false;  ///< also scores the widths of sensitivity.gram.bits
};

struct MeasureResult {
  double nll_per_token = 0;  ///< of the data labels on the calibration set, nats
  double wall_s = 0;
  int64_t n_tokens = 0;
};

/// Pipelined forward and backward (1F1B) over the calibration set with frozen weights: leaves D of every
/// token, module and row group, Σx², max|x| and α of [AS 5] and [AS 6], and on request H, one file a block,
/// the same bytes for any grid.
///
/// Memory   a stage keeps one input a block and microbatch in flight (stages − stage of them) and recomputes
/// the block in the backward;
///          D of its blocks for its replica's sequences; one partial sum a tree level of each statistic.
/// Network  per microbatch and stage border: one hidden state forward, n_samples gradients back; at the end
/// per block one tree reduction
///          of the channel statistics over the replicas and D to replica 0.
/// Collective over the session's world. Throws StopRequested on every rank when a stop was asked for;
/// NumericError for non-finite values (module, sequence, token).
MeasureResult measure(const Session& session, const CalibrationSet& calibration, const StageWeights& weights,
                      const MeasurePass& pass, report::EventLog& events);

/// Identity of the statistics a run needs: model, tokens, loss … (what `sensitivity.reuse` compares).
[[nodiscard]] StatisticsHeader statistics_header(const Session& session, const CalibrationSet& calibration);

}  // namespace isobath::pipeline
