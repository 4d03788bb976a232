#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

/// Small files whole, and the pieces of the commit protocol. All throw IoError naming path and system
/// message; "No space left" adds needed and free bytes.
namespace isobath::io {

namespace fs = std::filesystem;

/// Whole file as text. `max_bytes` bounds what is read (DataError above it).
[[nodiscard]] std::string read_text(const fs::path& path, int64_t max_bytes = int64_t{1} << 28);
/// Writes `path`.tmp, fsyncs, renames over `path`, fsyncs the directory: the old or the new content, never a
/// part.
void write_text_atomically(const fs::path& path, std::string_view text);
void sync_file(const fs::path& path);
void sync_directory(const fs::path& path);
/// rename + fsync of the parent directory.
void rename_durably(const fs::path& from, const fs::path& to);
void make_directories(const fs::path& path);
/// Copies a file via a temporary name and renames it.
void copy_atomically(const fs::path& from, const fs::path& to);
/// Removes what killed writers left in `directory`: temporary files of the two above and of
/// write_safetensors. Nobody may be writing there.
void remove_temporaries(const fs::path& directory);
[[nodiscard]] int64_t free_bytes(const fs::path& path);

}  // namespace isobath::io
