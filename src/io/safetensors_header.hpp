#pragma once
#include <isobath/io/safetensors_reader.hpp>
#include <map>
#include <string>
#include <string_view>

namespace isobath::io {

struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;  ///< byte offsets in the file
  std::map<std::string, std::string> metadata;
};

/// Verifies the JSON text of a safetensors header against every rule of the format and against the size of
/// the file. Memory   O(number of tensors); the parser keeps no tree and does not recurse. Throws   DataError
/// naming file, tensor and rule.
[[nodiscard]] SafetensorsHeader parse_safetensors_header(const std::string& file, std::string_view text,
                                                         int64_t file_bytes);

}  // namespace isobath::io
