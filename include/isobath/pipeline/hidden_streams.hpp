#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/pipeline/prefix_activations.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace isobath::pipeline {

/// This rank's share of the calibration sequences on their way through the model: behind the quantized
/// prefix, and, when an asymmetric correction asks for it, beside it through the original model. Both stop
/// before the same input sets.
///
/// Memory   PrefixActivations, twice with the original stream; then also one more forward pass.
class HiddenStreams {
 public:
  HiddenStreams(const Session& session, const CalibrationSet& calibration, bool with_original);

  /// The logical shards' microbatches that this rank works on, whatever its stage.
  [[nodiscard]] const std::vector<data::Microbatch>& microbatches() const {
    return quantized_.microbatches();
  }
  /// Hidden states behind the quantized prefix, at the entrance of the next block: [b, T, d_model].
  [[nodiscard]] const at::Tensor& hidden(int64_t microbatch) const { return quantized_.hidden(microbatch); }

  /// Starts both streams from the embedded tokens: rows `tokens` [sequences, T] i64 of all sequences of an
  /// embedding. Local.
  void embed(const at::Tensor& embedding, const at::Tensor& tokens);
  /// Takes note of the original weights of the block that comes next. Local.
  void enter_block(const model::BlockWeights& original) {
    if (original_) original_weights_ = original;
  }
  /// Visits X of an input set, and X of the original model, microbatch by microbatch; valid once the sets
  /// before it were advanced through. `weights` must outlive the result.
  [[nodiscard]] ForEachInput inputs(int set, const model::BlockWeights& weights) const;
  /// Applies the linears of a set, by now quantized, and in the original stream the original ones. Local.
  /// Throws NumericError when the last set leaves a non-finite hidden state (names block and sequences).
  void advance(int set, const model::BlockWeights& weights, int64_t block);

  /// Σ‖h − h̃‖² / Σ‖h̃‖² over all tokens, h̃ of the original stream: the same on every rank and for every
  /// number of ranks; empty without that stream. Collective over the session's world.
  [[nodiscard]] std::optional<double> deviation() const;

  /// What a generation must hold of this rank's share, by name; CPU copies.
  [[nodiscard]] std::vector<std::pair<std::string, at::Tensor>> state() const;
  /// Local. Throws what Generation::read throws.
  void restore(const checkpoint::Generation& generation);

 private:
  const Session& session_;
  const CalibrationSet& calibration_;
  PrefixActivations quantized_;
  std::optional<PrefixActivations> original_;
  model::BlockWeights original_weights_;  // of the block in work
};

}  // namespace isobath::pipeline
