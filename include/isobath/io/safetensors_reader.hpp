#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace isobath::io {

struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t begin;  ///< byte offset in the file (not in the data buffer)
  int64_t end;
};

/// A safetensors file, opened strictly: everything of FORMATS §1 is verified from the header alone; data is
/// read by `pread` (a file that shrinks is an error, not a SIGBUS). Thread-safe after construction. Throws
/// DataError for a bad file (naming file, tensor and rule), IoError when it cannot be read.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::filesystem::path& path);
  ~SafetensorsReader();
  SafetensorsReader(SafetensorsReader&&) noexcept;
  SafetensorsReader& operator=(SafetensorsReader&&) noexcept;

  [[nodiscard]] const std::filesystem::path& path() const;
  [[nodiscard]] const std::map<std::string, TensorInfo>& tensors() const;
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const;
  /// Size of the file and XXH3 of its header text: a cheap identity.
  [[nodiscard]] int64_t file_bytes() const;
  [[nodiscard]] const std::string& header_digest() const;
  /// Throws DataError naming the file when absent.
  [[nodiscard]] const TensorInfo& info(const std::string& name) const;
  /// The whole tensor, CPU, in the file's dtype.
  [[nodiscard]] at::Tensor read(const std::string& name) const;
  /// Rows [begin, end) of dimension 0.
  [[nodiscard]] at::Tensor read_rows(const std::string& name, int64_t begin, int64_t end) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// A Hugging Face checkpoint directory: `model.safetensors`, or `model.safetensors.index.json` and its
/// shards. Opening reads and verifies the headers of all shards named by the index: each weight_map entry
/// must stand in its shard; shard names must be plain file names (no separators). A missing, truncated or
/// malformed shard is a DataError naming shard and tensor.
class ShardedReader {
 public:
  explicit ShardedReader(const std::filesystem::path& directory);
  ~ShardedReader();
  ShardedReader(ShardedReader&&) noexcept;
  ShardedReader& operator=(ShardedReader&&) noexcept;

  [[nodiscard]] const std::filesystem::path& directory() const;
  [[nodiscard]] bool contains(const std::string& name) const;
  [[nodiscard]] const TensorInfo& info(const std::string& name) const;
  [[nodiscard]] at::Tensor read(const std::string& name) const;
  [[nodiscard]] at::Tensor read_rows(const std::string& name, int64_t begin, int64_t end) const;
  [[nodiscard]] std::vector<std::string> names() const;
  /// Digest of each shard's size, header and eight samples of 4 KiB of its bytes: a cheap identity of the
  /// checkpoint. Reads the samples each time. Throws IoError.
  [[nodiscard]] std::string fingerprint() const;
  /// `__metadata__` of the shard that holds `name`.
  [[nodiscard]] const std::map<std::string, std::string>& metadata_beside(const std::string& name) const;
  /// File name of the shard that holds `name`, for messages.
  [[nodiscard]] std::string shard_of(const std::string& name) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace isobath::io
