#include <isobath/io/files.hpp>

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <isobath/core/error.hpp>
#include <system_error>

#include "posix_file.hpp"

namespace isobath::io {
namespace {

constexpr size_t kCopyBytes = size_t{8} << 20;

constexpr std::string_view kTemporarySuffix = ".tmp";

fs::path with_suffix(fs::path path) {
  path += kTemporarySuffix;
  return path;
}

/// "" names the current directory in relative paths.
fs::path or_current(const fs::path& directory) {
  return directory.empty() ? fs::path(".") : directory;
}

void sync_by_name(const fs::path& path, int flags) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  if (descriptor < 0) fail_io("open", path, errno);
  int reason = 0;
  while (::fsync(descriptor) != 0) {
    if (errno == EINTR) continue;
    reason = errno;
    break;
  }
  ::close(descriptor);
  // Some network file systems cannot sync a directory; their renames are synchronous.
  const bool is_unsupported = (flags & O_DIRECTORY) != 0 && (reason == EINVAL || reason == ENOTSUP);
  if (reason != 0 && !is_unsupported) fail_io("sync", path, reason);
}

}  // namespace

std::string read_text(const fs::path& path, int64_t max_bytes) {
  const PosixFile file = PosixFile::open_for_reading(path);
  const int64_t size = file.status().st_size;
  if (size > max_bytes) {
    fail<DataError>("{} has {} bytes, at most {} are expected of such a file", path.string(), size,
                    max_bytes);
  }
  std::string text(static_cast<size_t>(size), '\0');
  text.resize(
      static_cast<size_t>(file.read_at(std::as_writable_bytes(std::span(text.data(), text.size())), 0)));
  return text;
}

void write_text_atomically(const fs::path& path, std::string_view text) {
  TemporaryFile file(path, with_suffix(path), static_cast<int64_t>(text.size()));
  file.append(std::as_bytes(std::span(text.data(), text.size())));
  file.commit();
}

void sync_file(const fs::path& path) {
  sync_by_name(path, 0);
}

void sync_directory(const fs::path& path) {
  sync_by_name(or_current(path), O_DIRECTORY);
}

void rename_durably(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) {
    const int reason = errno;
    fail_io(fmt::format("rename {} to", from.string()), to, reason);
  }
  sync_directory(to.parent_path());
  if (from.parent_path() != to.parent_path()) sync_directory(from.parent_path());
}

void make_directories(const fs::path& path) {
  std::error_code status;
  const bool is_new = fs::create_directories(path, status);
  if (!status && !fs::is_directory(path, status)) status = std::make_error_code(std::errc::not_a_directory);
  if (status) fail_io("make the directory", path, status.value());
  if (is_new) sync_directory(path.parent_path());
}

void copy_atomically(const fs::path& from, const fs::path& to) {
  const PosixFile source = PosixFile::open_for_reading(from);
  const int64_t size = source.status().st_size;
  TemporaryFile target(to, with_suffix(to), size);
  std::string buffer(std::min(kCopyBytes, static_cast<size_t>(size) + 1), '\0');
  const std::span<std::byte> bytes = std::as_writable_bytes(std::span(buffer.data(), buffer.size()));
  int64_t offset = 0;
  while (const int64_t n = source.read_at(bytes, offset)) {
    target.append(bytes.first(static_cast<size_t>(n)));
    offset += n;
  }
  if (offset != size) {
    fail<IoError>("{} changed while it was copied to {}: {} bytes at first, {} copied", from.string(),
                  to.string(), size, offset);
  }
  target.commit();
}

void remove_temporaries(const fs::path& directory) {
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    const bool is_temporary = name.ends_with(kTemporarySuffix) ||
                              (name.starts_with('.') && name.find(".tmp-") != std::string::npos);
    if (!is_temporary || !entry.is_regular_file()) continue;
    if (::unlink(entry.path().c_str()) != 0) fail_io("remove", entry.path(), errno);
  }
}

int64_t free_bytes(const fs::path& path) {
  // Files about to be written do not exist yet: the nearest existing directory tells.
  fs::path existing = path;
  std::error_code status;
  while (!existing.empty() && !fs::exists(existing, status) && existing != existing.parent_path()) {
    existing = existing.parent_path();
  }
  struct statvfs file_system {};
  if (::statvfs(or_current(existing).c_str(), &file_system) != 0)
    fail_io("ask for the free space of", path, errno);
  return static_cast<int64_t>(file_system.f_bavail) * static_cast<int64_t>(file_system.f_frsize);
}

}  // namespace isobath::io
