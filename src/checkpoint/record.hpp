#pragma once
#include <cstdint>
#include <filesystem>
#include <isobath/checkpoint/generation_store.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace isobath::checkpoint {

using Json = nlohmann::ordered_json;

/// JSON text whose last field is the XXH3 digest of every byte before it: one changed bit anywhere shows.
[[nodiscard]] std::string seal(const Json& body);
/// Inverse of `seal`. Throws CheckpointError naming `source` when the text is not what `seal` wrote.
[[nodiscard]] Json unseal(const std::string& text, const std::string& source);

/// One line for each field that differs ("quantization.bits: 3 in the run, 4 now"); empty when there is none.
[[nodiscard]] std::string differences(const Fingerprint& recorded, const Fingerprint& now);

/// What a manifest says about a file.
struct FileRecord {
  std::string name;  ///< relative to its root
  int64_t bytes = 0;
  std::string digest;
  std::vector<std::string> datasets;  ///< of a rank's file

  [[nodiscard]] Json to_json() const;
  [[nodiscard]] static FileRecord from_json(const Json& json);
  /// Size and digest of `root` / `name` as it is on disk now. Throws IoError.
  [[nodiscard]] static FileRecord of(const std::filesystem::path& root, const std::string& name);
  /// What is wrong with the file on disk, naming it; empty when it is what the record says.
  [[nodiscard]] std::string problem_in(const std::filesystem::path& root) const;
};

/// Everything a generation consists of; written last.
struct Manifest {
  int64_t number = 0;
  Fingerprint fingerprint;
  std::vector<FileRecord> rank_files;
  FileRecord state;
  std::map<std::string, FileRecord> outputs;

  [[nodiscard]] std::string to_text() const;
  /// Throws CheckpointError naming `source`.
  [[nodiscard]] static Manifest from_text(const std::string& text, const std::string& source);
};

}  // namespace isobath::checkpoint
