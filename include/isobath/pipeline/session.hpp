#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/comm/grid.hpp>
#include <isobath/config/run_config.hpp>
#include <isobath/data/shards.hpp>
#include <isobath/data/token_file.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <isobath/model/weight_store.hpp>
#include <isobath/pipeline/schedule.hpp>
#include <isobath/report/events.hpp>
#include <isobath/sensitivity/row_clusters.hpp>
#include <memory>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// What every stage of a run shares: who the ranks are, which blocks each holds, in which precision they
/// compute.
struct Session {
  config::RunConfig config;
  std::shared_ptr<const model::CheckpointReader> source;  ///< the original model; headers only
  std::unique_ptr<comm::Grid> grid;
  c10::Device device = c10::Device(c10::kCPU);
  std::unique_ptr<comm::DeviceCommunicator> devices;  ///< of the world
  at::ScalarType dtype = at::ScalarType::Float;       ///< of activations and weights in compute
  int threads = 1;
  std::vector<Range> stage_blocks;  ///< [stages]: blocks of each stage

  [[nodiscard]] const comm::Communicator& world() const { return grid->world(); }
  [[nodiscard]] const model::ModelConfig& model() const { return source->config(); }
  [[nodiscard]] Range my_blocks() const { return stage_blocks[static_cast<size_t>(grid->stage())]; }
  [[nodiscard]] int stage_of(int64_t block) const;
  [[nodiscard]] bool is_last_stage() const { return grid->stage() + 1 == grid->shape().stages; }
  [[nodiscard]] bool is_streamed() const { return config.residency == "streamed"; }
};

/// What the stages of a measure pass may keep; nothing with streamed weights.
[[nodiscard]] model::Activations kept_activations(const config::RunConfig& config, at::ScalarType dtype);

/// The precision that a run with this configuration computes in.
[[nodiscard]] at::ScalarType choose_dtype(const config::RunConfig& config, const model::ModelConfig& model,
                                          c10::Device device);

/// Opens the model, forms the grid, balances the stages, sets the threads. `n_microbatches` steers the
/// automatic choice of the grid.
///
/// Collective over `world`. Throws AgreedFailure: data for a bad checkpoint; config when the ranks cannot be
/// split as asked.
[[nodiscard]] Session open_session(const config::RunConfig& config, int64_t n_microbatches,
                                   const comm::Communicator& world);

/// Calibration tokens and how they are dealt.
struct CalibrationSet {
  data::TokenSet tokens;  ///< replicated
  data::ShardPlan shards;
  /// Rows [sequences] of tokens and lengths.
  [[nodiscard]] at::Tensor tokens_of(Range sequences) const {
    return tokens.tokens.slice(0, sequences.begin, sequences.end);
  }
  [[nodiscard]] at::Tensor lengths_of(Range sequences) const {
    return tokens.lengths.slice(0, sequences.begin, sequences.end);
  }
  /// [b, T] bool, true for real tokens; undefined when none of the sequences is padded.
  [[nodiscard]] at::Tensor mask_of(Range sequences) const;
};

/// Collective over the session's world. Throws AgreedFailure (data).
[[nodiscard]] CalibrationSet open_calibration(const Session& session);

/// The entry of a run's fingerprint for the threads of a rank.
inline constexpr const char* kThreadsOfFingerprint = "ranks.threads (resolved)";

/// The weights of `checkpoint` as the configuration's `residency` has them: this rank's stage's blocks, and
/// embedding or head at the ends, read now; or everything when it is needed. Collective only in agreeing on
/// failure (AgreedFailure: data, numeric, io).
[[nodiscard]] model::WeightStore open_weights(const Session& session,
                                              std::shared_ptr<const model::CheckpointReader> checkpoint);

/// The weights of `block` on the ranks for which `mine` is true, which read the block of theirs that follows
/// ahead; nothing elsewhere. Collective over the session's world: a failure to read is one on all ranks.
[[nodiscard]] model::BlockWeights take_block(const Session& session, const model::WeightStore& weights,
                                             int64_t block, bool mine, int64_t next);

/// The row groups of a block's seven linears.
using BlockRowGroups = std::array<sensitivity::RowGroups, model::kProjections>;

/// Those of every block, as sensitivity.row_groups and sensitivity.grouping say. Precondition: grouping by
/// index or head, or one group; which rows a cluster has is measured (pipeline/row_grouping.hpp).
[[nodiscard]] BlockRowGroups row_groups_of(const Session& session);
/// Whether row groups are measured.
[[nodiscard]] bool clusters_rows(const config::Sensitivity& sensitivity);

/// What must be equal for a resume: every configuration key that the result depends on, the model, the
/// tokens, the precision.
[[nodiscard]] checkpoint::Fingerprint fingerprint_of(const Session& session,
                                                     const CalibrationSet& calibration);

/// What the run asks of its calibration tokens, and of its evaluation tokens. Local.
[[nodiscard]] data::TokenRequirements requirements_of(const config::RunConfig& config,
                                                      const model::ModelConfig& model);
[[nodiscard]] data::TokenRequirements evaluation_requirements_of(const config::RunConfig& config,
                                                                 const model::ModelConfig& model);

/// Time and resident weights of the largest stage for each number of stages up to n_ranks. Local.
[[nodiscard]] std::vector<StageCost> stage_costs(const model::ModelConfig& model, int64_t length,
                                                 const model::Activations& activations, int n_ranks);

/// SHA-256 of a model directory's tokenizer.json; empty when there is none.
[[nodiscard]] std::string tokenizer_digest(const std::filesystem::path& model_directory);

}  // namespace isobath::pipeline
