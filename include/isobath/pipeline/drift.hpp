#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <filesystem>
#include <isobath/pipeline/session.hpp>
#include <map>
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
/// Compares D measured now on `probe` (blocks of this stage, as measure_token_weights returns it) with what
/// `statistics` holds of the same sequences, over all modules of blocks >= first_block.
///
/// Collective over the session's world; the same on every rank and for any grid. Throws AgreedFailure for
/// statistics that cannot be read.
[[nodiscard]] Drift measure_drift(const Session& session, const std::vector<data::Microbatch>& probe,
                                  const std::map<int64_t, std::array<at::Tensor, model::kProjections>>& now,
                                  const std::filesystem::path& statistics, int64_t first_block);

}  // namespace isobath::pipeline
