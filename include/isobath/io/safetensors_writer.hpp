#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace isobath::io {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

/// Writes one safetensors file atomically (temporary name in the same directory, fsync, rename).
/// Byte-deterministic: tensors are laid out by descending dtype size, then name, as the reference writer
/// does; the header is padded with spaces to 8 bytes; metadata keys sorted. Throws IoError (disk full: needed
/// and free bytes) and leaves no file behind.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const std::map<std::string, std::string>& metadata);

/// "model-00003-of-00032.safetensors"; index counts from 1.
[[nodiscard]] std::string shard_file_name(int64_t index, int64_t count);

}  // namespace isobath::io
