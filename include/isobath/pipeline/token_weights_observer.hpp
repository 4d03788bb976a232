#pragma once
#include <array>
#include <isobath/pipeline/block_observer.hpp>

namespace isobath::pipeline {

/// D of one block's linears: ‖g‖² of every token and row group, of this rank's sequences.
///
/// Memory   4 bytes a token, linear and row group.
class TokenWeightsObserver : public BlockObserver {
 public:
  /// n_samples: gradients of a microbatch, whose D are averaged.
  TokenWeightsObserver(const Session& session, const CalibrationSet& calibration, BlockRowGroups row_groups,
                       int64_t n_samples);

  void begin(const data::Microbatch& microbatch, int64_t sample) override;
  void observe(model::Projection projection, const at::Tensor& x, const at::Tensor& gradient) override;
  void finish_microbatch(bool /*is_last_of_shard*/) override {}

  /// As `observe`; returns D of this gradient alone, [b, T, row_groups] f32, CPU.
  at::Tensor add(model::Projection projection, const at::Tensor& gradient);

  /// Of this rank's sequences so far: [n_local, T, row_groups] f32, CPU, zero where nothing was observed.
  [[nodiscard]] const at::Tensor& value(model::Projection projection) const {
    return value_[static_cast<size_t>(projection)];
  }
  /// Of the microbatch in work: [b, T, row_groups], a view.
  [[nodiscard]] at::Tensor of_microbatch(model::Projection projection) const;
  [[nodiscard]] const BlockRowGroups& row_groups() const { return row_groups_; }
  /// This rank's.
  [[nodiscard]] Range sequences() const { return sequences_; }

 private:
  BlockRowGroups row_groups_;
  int64_t n_samples_;
  Range sequences_, of_microbatch_{};
  std::array<at::Tensor, model::kProjections> value_;
};

}  // namespace isobath::pipeline
