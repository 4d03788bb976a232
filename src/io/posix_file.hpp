#pragma once
#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace isobath::io {

/// Throws IoError "cannot <action> <path>: <system message>". When the disk, the quota or the file-size limit
/// is what is exhausted, the message adds the bytes needed (where known, > 0) and the bytes free, and says
/// what to do.
[[noreturn]] void fail_io(std::string_view action, const std::filesystem::path& path, int reason,
                          int64_t needed_bytes = 0);

/// The same hint for errors that come from a library: "; needs … bytes, … bytes are free …".
[[nodiscard]] std::string space_hint(const std::filesystem::path& path, int64_t needed_bytes);

/// A file descriptor whose transfers are complete or an error: short reads and writes and EINTR are handled
/// here.
class PosixFile {
 public:
  PosixFile() = default;
  ~PosixFile();
  PosixFile(PosixFile&& other) noexcept
      : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}
  PosixFile& operator=(PosixFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }

  /// A regular file; a pipe or device named by mistake is refused rather than waited for.
  [[nodiscard]] static PosixFile open_for_reading(const std::filesystem::path& path);
  /// A new file. What stands there is removed first, never followed: it may be a link out of the directory.
  [[nodiscard]] static PosixFile create(const std::filesystem::path& path);
  /// A new file for reading and writing whose name is gone again at once. name_template: ends in XXXXXX,
  /// becomes the name it had.
  [[nodiscard]] static PosixFile create_nameless(std::string& name_template);

  [[nodiscard]] struct stat status() const;
  /// Number of bytes read: less than asked for only at the end of the file.
  [[nodiscard]] int64_t read_at(std::span<std::byte> bytes, int64_t offset) const;
  void append(std::span<const std::byte> bytes, int64_t needed_bytes = 0);
  void sync(int64_t needed_bytes = 0);
  /// Closes and reports what the file system held back until then (NFS); the destructor stays silent.
  void close(int64_t needed_bytes = 0);

 private:
  PosixFile(std::filesystem::path path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}

  std::filesystem::path path_;
  int descriptor_ = -1;
};

/// A new file under a temporary name of the same directory, gone unless committed.
class TemporaryFile {
 public:
  /// needed_bytes is for messages: how large the file becomes.
  TemporaryFile(std::filesystem::path path, std::filesystem::path temporary, int64_t needed_bytes);
  ~TemporaryFile();
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void append(std::span<const std::byte> bytes) { file_.append(bytes, needed_bytes_); }
  /// fsync, close, rename to the final name, fsync of the directory.
  void commit();

 private:
  std::filesystem::path path_, temporary_;
  int64_t needed_bytes_;
  PosixFile file_;
  bool committed_ = false;
};

}  // namespace isobath::io
