#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>

namespace isobath::io {

/// Tensors that have to leave memory for a while. The file loses its name as soon as it is open: its space is
/// free again when this object or the process ends, however that ends. Not synced: nothing outlives the job.
class ScratchFile {
 public:
  /// Makes the directory when it is missing. Throws IoError.
  explicit ScratchFile(const std::filesystem::path& directory);
  ~ScratchFile();
  ScratchFile(ScratchFile&&) noexcept;
  ScratchFile& operator=(ScratchFile&&) noexcept;

  /// Appends the bytes of a contiguous CPU tensor; returns where they begin. Throws IoError (disk full: with
  /// needed and free bytes).
  int64_t append(const at::Tensor& tensor);
  /// Fills a contiguous CPU tensor with the bytes that `append` put at `begin`. Throws IoError.
  void read(at::Tensor& tensor, int64_t begin) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace isobath::io
