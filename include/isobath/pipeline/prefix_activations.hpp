#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/pipeline/block_solver.hpp>
#include <isobath/pipeline/session.hpp>
#include <map>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// This rank's share of the calibration sequences on their way through the blocks, quantized or original: the
/// residual stream, and the state inside the sublayer in work. A block runs once, stopping before each input
/// set.
///
/// Memory   n_local · T · (d_model + max(d_ff, n_heads · head_dim)) in compute dtype.
class PrefixActivations {
 public:
  /// stream: what to call it in errors.
  PrefixActivations(const Session& session, const CalibrationSet& calibration, std::string stream);

  /// The logical shards' microbatches that this rank works on, whatever its stage.
  [[nodiscard]] const std::vector<data::Microbatch>& microbatches() const { return microbatches_; }
  /// Hidden states at the entrance of the next block: [b, T, d_model]. They are changed in place: new tensors
  /// would scatter over the memory that a block's inner states leave.
  [[nodiscard]] const at::Tensor& hidden(int64_t microbatch) const { return hidden_.at(microbatch); }
  /// Takes `hidden` over: nobody else may read it later.
  void set_hidden(int64_t microbatch, at::Tensor hidden) { hidden_[microbatch] = std::move(hidden); }

  /// Starts from rows `tokens` [sequences, T] i64, of all sequences, of an embedding. Local.
  void embed(const at::Tensor& embedding, const at::Tensor& tokens);
  /// X of an input set [b, T, d_in]; valid once the sets before it were advanced through.
  [[nodiscard]] at::Tensor input(int set, const model::BlockWeights& weights, int64_t microbatch) const;
  /// Applies the linears of a set and goes on to the input of the next one. Local.
  /// Throws NumericError when the last set leaves a non-finite hidden state (names block and sequences).
  void advance(int set, const model::BlockWeights& weights, int64_t block);

 private:
  void require_finite(int64_t block) const;

  const Session& session_;
  std::string stream_;
  model::Rotary rotary_;
  std::vector<data::Microbatch> microbatches_;
  std::map<int64_t, at::Tensor> hidden_;  // by microbatch index
  std::map<int64_t, at::Tensor> inner_;   // attention output, or gated activation [b, T, d_ff]
};

}  // namespace isobath::pipeline
