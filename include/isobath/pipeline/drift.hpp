#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <isobath/pipeline/session.hpp>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// Microbatches spread evenly over the calibration set, in order: as few as hold `n_sequences`, at most all.
/// A function of the shards alone, never of the ranks.
///
///   8 microbatches of 1 sequence, n_sequences = 3: 0, 2, 5
[[nodiscard]] std::vector<data::Microbatch> probe_microbatches(const data::ShardPlan& shards,
                                                               int64_t n_sequences);

/// Cosine of two sets of token weights [n, T, row_groups] as the solver would use them (clipped and raised as
/// `sensitivity` says), averaged over the row groups: 1 when they differ by a factor. 0 where one of them is
/// all zero. Clipped first, as a few tokens hold most of raw D (method.md).
[[nodiscard]] double token_weight_cosine(const at::Tensor& in_use, const at::Tensor& now,
                                         const config::Sensitivity& sensitivity);

struct Drift {
  double cosine = 1;    ///< mean over the modules
  double smallest = 1;  ///< of one module
  std::string module;   ///< which one that is
};
/// D of a block's linears, [n, T, row_groups] each.
using TokenWeightsOf = std::function<std::array<at::Tensor, model::kProjections>(int64_t block)>;

/// Compares two measurements of D of the same sequences over all modules of blocks >= first_block; each is
/// asked for the blocks of a stage, in order, on one of its replicas.
///
/// Memory   D of one block, twice. Collective over the session's world; the same on every rank and for any
/// grid. Throws AgreedFailure for what the arguments throw.
[[nodiscard]] Drift measure_drift(const Session& session, int64_t first_block, const TokenWeightsOf& in_use,
                                  const TokenWeightsOf& now);

}  // namespace isobath::pipeline
