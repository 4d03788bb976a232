#pragma once
#include <array>
#include <isobath/comm/tree_sum.hpp>
#include <isobath/pipeline/perturbation_observer.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <isobath/pipeline/token_weights_observer.hpp>
#include <isobath/sensitivity/channel_statistics.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <optional>
#include <vector>

namespace isobath::pipeline {

/// All that `measure` finds of one block: D, Σx², max|x|, α, on request H and the scores of widths. Reduced
/// over the replicas in an order fixed by the logical shards.
class StatisticsObserver : public BlockObserver {
 public:
  struct Options {
    int64_t n_samples = 1;           ///< gradients of a microbatch: label draws of the loss
    BlockRowGroups row_groups = {};  ///< of D and H
    /// The block's weights when the widths of sensitivity.gram.bits are to be scored, else null.
    const model::BlockWeights* perturbed = nullptr;
    /// What these widths make of them, in the checkpoint's dtype; empty: rounded to nearest.
    std::vector<model::BlockWeights> perturbed_versions = {};
  };
  StatisticsObserver(const Session& session, const CalibrationSet& calibration, int64_t block,
                     const Options& options);

  void begin(const data::Microbatch& microbatch, int64_t sample) override;
  void observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) override;
  void finish_microbatch(bool is_last_of_shard) override;

  /// Collective over the replicas of this stage: the whole calibration set's statistics on the block's root;
  /// empty tensors elsewhere.
  [[nodiscard]] BlockStatistics reduce();

 private:
  struct Module {
    std::optional<sensitivity::ChannelStatistics> shard = {};
    std::vector<sensitivity::Covariance> shard_covariances = {};  // one a row group
    comm::TreeSum sums, maxima;                                   // of ChannelStatistics
    std::vector<comm::TreeSum> covariances = {};                  // one a row group
    std::optional<PerturbationObserver> perturbations = {};
    at::Tensor input = {};  // of this microbatch, kept when covariances are asked for
  };
  [[nodiscard]] at::Tensor gather(const at::Tensor& rows, int tag) const;
  [[nodiscard]] Perturbations gather(const Perturbations& local) const;
  void open_shard(Module& module, int64_t n_channels);

  const Session& session_;
  const CalibrationSet& calibration_;
  int64_t block_;
  int root_;
  int64_t n_samples_;
  TokenWeightsObserver token_weights_;
  data::Microbatch microbatch_{};
  int64_t sample_ = 0;
  at::Tensor mask_;
  std::vector<Module> modules_;  // by Projection
};

}  // namespace isobath::pipeline
