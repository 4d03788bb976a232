#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/io/scratch_file.hpp>
#include <isobath/pipeline/session.hpp>
#include <map>
#include <optional>
#include <utility>

namespace isobath::pipeline {

/// Inputs of blocks, kept from the forward to the backward pass of streamed weights: in memory up to
/// scratch.memory_gib, beyond that in a file of scratch.directory, where one is set.
class KeptStates {
 public:
  explicit KeptStates(const Session& session) : session_(session) {}

  /// Throws IoError.
  void keep(int64_t block, int64_t item, const at::Tensor& state);
  /// The state, which is not kept any longer; on the session's device. Throws IoError.
  [[nodiscard]] at::Tensor take(int64_t block, int64_t item);
  /// Gives back what is left of a block, the file too.
  void forget(int64_t block) { files_.erase(block); }

 private:
  struct OnDisk {
    std::vector<int64_t> shape;
    int64_t begin;
  };
  const Session& session_;
  std::map<std::pair<int64_t, int64_t>, at::Tensor> in_memory_;  // by block and item
  std::map<std::pair<int64_t, int64_t>, OnDisk> on_disk_;
  std::map<int64_t, io::ScratchFile> files_;  // one a block: its space is free as soon as the block is done
  double memory_bytes_ = 0;
};

}  // namespace isobath::pipeline
