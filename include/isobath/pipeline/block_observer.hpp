#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <isobath/comm/tree_sum.hpp>
#include <isobath/model/block.hpp>
#include <isobath/pipeline/perturbation_observer.hpp>
#include <isobath/pipeline/scale_gradients.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <isobath/sensitivity/channel_statistics.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <optional>
#include <vector>

namespace isobath::pipeline {

/// Collects the statistics of one block's seven linears on one rank during the backward passes of its
/// replica's microbatches, and reduces them over the replicas in an order fixed by the logical shards.
class BlockObserver {
 public:
  struct Options {
    int64_t n_samples = 1;  ///< gradients of a microbatch: label draws of the loss
    /// D and nothing else; `reduce` has nothing to reduce then.
    bool only_token_weights = false;
    /// Row profiles of these microbatches and nothing else, not even D: what `reduce_profile` reduces. They
    /// are some of the calibration set, ascending, on every replica the same. Null: no profiles.
    const std::vector<data::Microbatch>* profiled = nullptr;
    /// ∂L/∂s of these blocks' scales and nothing else, over the microbatches of these logical shards: what
    /// `reduce_scale_gradient` reduces. Null: none.
    const std::map<int64_t, BlockTuners>* tuners = nullptr;
    std::vector<int64_t> tuned_shards = {};
    BlockRowGroups row_groups = {};  ///< of D and H; not needed for profiles
    /// The block's weights when the widths of sensitivity.gram.bits are to be scored, else null.
    const model::BlockWeights* perturbed = nullptr;
    /// What these widths make of them, in the checkpoint's dtype; empty: rounded to nearest.
    std::vector<model::BlockWeights> perturbed_versions = {};
  };
  BlockObserver(const Session& session, const CalibrationSet& calibration, int64_t block,
                const Options& options);

  /// What the backward passes that follow belong to.
  void begin(const data::Microbatch& microbatch, int64_t sample);
  /// A linear's input [b, T, d_in] and output gradient [b, T, d_out] in one backward pass.
  void observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient);
  /// Closes the microbatch after its last sample; closes its logical shard when `is_last_of_shard`.
  void finish_microbatch(bool is_last_of_shard);

  /// D of this rank's sequences so far: [n_local, T, row_groups] f32, CPU, zero where nothing was observed.
  [[nodiscard]] const at::Tensor& token_weights(model::Projection projection) const {
    return modules_[static_cast<size_t>(projection)].token_weights;
  }

  /// The replica on which `reduce` leaves the statistics: blocks take turns.
  [[nodiscard]] int root() const;
  /// Collective over the replicas of this stage: the whole calibration set's statistics on the root; empty
  /// tensors elsewhere.
  [[nodiscard]] BlockStatistics reduce();
  /// Collective over the replicas of this stage: the profiles of a linear's rows, [d_out,
  /// sensitivity::kProfileLength] f32, on the root; an undefined tensor elsewhere.
  [[nodiscard]] at::Tensor reduce_profile(model::Projection projection);
  /// Collective over the replicas of this stage: ∂L/∂s of a quantized linear [R, G] f32 CPU, on all of them.
  [[nodiscard]] at::Tensor reduce_scale_gradient(model::Projection projection);

 private:
  struct Module {
    at::Tensor token_weights;  // [n_local, T, row_groups] f32
    std::optional<sensitivity::ChannelStatistics> shard;
    std::vector<sensitivity::Covariance> shard_covariances;  // one a row group
    std::vector<comm::TreeSum> sums;                         // one: the sums of ChannelStatistics
    std::vector<comm::TreeSum> maxima;
    std::vector<comm::TreeSum> covariances;  // one a row group
    std::vector<comm::TreeSum> profiles;     // one, its leaves the profiled microbatches
    at::Tensor profile;                      // of this microbatch
    std::optional<PerturbationObserver> perturbations;
    at::Tensor input;  // of this microbatch, kept when covariances are asked for
  };
  [[nodiscard]] at::Tensor gather(const at::Tensor& rows, int tag) const;
  [[nodiscard]] Perturbations gather(const Perturbations& local) const;
  void open_shard(Module& module, int64_t n_channels);

  const Session& session_;
  const CalibrationSet& calibration_;
  int64_t block_;
  int64_t n_samples_;
  bool only_token_weights_;
  const std::vector<data::Microbatch>* profiled_;
  BlockRowGroups row_groups_;
  Range local_sequences_;
  data::Microbatch microbatch_{};
  int64_t sample_ = 0;
  at::Tensor mask_;
  std::array<Module, model::kProjections> modules_;
  std::optional<ScaleGradients> scale_gradients_;
};

}  // namespace isobath::pipeline
