#pragma once
#include <cstdint>
#include <filesystem>
#include <isobath/checkpoint/run_state.hpp>
#include <set>
#include <string>
#include <vector>

/// How generations are named and laid out on disk.
namespace isobath::checkpoint {

inline constexpr const char* kTemporarySuffix = ".tmp";
inline constexpr const char* kManifestName = "manifest.json";
inline constexpr const char* kStateName = "state.bin";

/// "gen-000017".
[[nodiscard]] std::string generation_name(int64_t number);
/// "rank-0003.h5".
[[nodiscard]] std::string rank_file_name(int rank);

struct Listing {
  std::set<int64_t> generations;
  std::vector<std::filesystem::path> unfinished;
};

/// What a store's directory holds; other names are ignored. Throws IoError.
[[nodiscard]] Listing list_generations(const std::filesystem::path& directory);

void remove_or_warn(const std::filesystem::path& path);
/// Removes a generation. It loses its name first, so that a crash half-way leaves a visibly unfinished
/// directory.
void retire(const std::filesystem::path& generation);

[[nodiscard]] std::string archive(const RunState& state);
/// Precondition: the digest of `bytes` was verified; an archive library is no parser for damaged bytes.
[[nodiscard]] RunState unarchive(const std::string& bytes);

}  // namespace isobath::checkpoint
