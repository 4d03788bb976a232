#pragma once
#include <cstdint>
#include <isobath/core/partition.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <memory>

namespace isobath::model {

/// The weights of one checkpoint as a rank works with them, in compute dtype on its device. *Resident*: the
/// rank's share was read once and stays. *Streamed*: each block is read when its turn comes and is gone when
/// the last handle to it is; any block, embedding and head can be had.
///
/// Memory   resident: the share. Streamed: what the caller holds, one block that is read ahead, and while a
/// tensor is read a piece of it in the checkpoint's dtype.
class WeightStore {
 public:
  /// What a rank keeps.
  struct Share {
    Range blocks;
    bool embedding = false, head = false;
  };

  /// Reads `share` and keeps it. Local. Throws what CheckpointReader throws.
  [[nodiscard]] static WeightStore resident(std::shared_ptr<const CheckpointReader> checkpoint,
                                            at::ScalarType dtype, c10::Device device, const Share& share);
  /// Reads nothing yet.
  [[nodiscard]] static WeightStore streamed(std::shared_ptr<const CheckpointReader> checkpoint,
                                            at::ScalarType dtype, c10::Device device);
  ~WeightStore();
  WeightStore(WeightStore&&) noexcept;
  WeightStore& operator=(WeightStore&&) noexcept;

  [[nodiscard]] bool is_streamed() const;
  /// Whether `block` costs no reading.
  [[nodiscard]] bool holds(int64_t block) const;

  /// Resident: a block of the share. Streamed: the block that was read ahead, after waiting for it, or the
  /// block read now; an error of reading ahead is thrown here. One thread may ask. Throws what
  /// CheckpointReader throws.
  [[nodiscard]] BlockWeights block(int64_t block) const;
  /// Streamed: starts to read the block in another thread; a block read ahead before and not asked for is
  /// dropped. Nothing happens with resident weights or behind the last block.
  void prefetch(int64_t block) const;

  /// Resident: another weight [d_out, d_in] for a linear of the share, in compute dtype on the device.
  void replace(int64_t block, Projection projection, const at::Tensor& weight);

  [[nodiscard]] at::Tensor embedding() const;  ///< [vocab, d_model]
  [[nodiscard]] HeadWeights head() const;

 private:
  struct State;
  explicit WeightStore(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace isobath::model
