#include "posix_file.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <cstdlib>

#include <cerrno>
#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>
#include <system_error>

namespace isobath::io {
namespace {

std::string system_text(int reason) {
  return std::generic_category().message(reason);
}

}  // namespace

std::string space_hint(const fs::path& path, int64_t needed_bytes) {
  std::string text = needed_bytes > 0 ? fmt::format("; {} bytes are needed", needed_bytes) : std::string();
  try {
    text += fmt::format("; {} bytes are free on its file system", free_bytes(path));
  } catch (const IoError&) {
    text += "; how many bytes are free could not be asked";
  }
  return text + "; free some space, raise the quota or the file-size limit (ulimit -f), or write elsewhere";
}

void fail_io(std::string_view action, const fs::path& path, int reason, int64_t needed_bytes) {
  const bool is_space = reason == ENOSPC || reason == EDQUOT || reason == EFBIG;
  fail<IoError>("cannot {} {}: {}{}", action, path.string(), system_text(reason),
                is_space ? space_hint(path, needed_bytes) : std::string());
}

PosixFile::~PosixFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

PosixFile PosixFile::open_for_reading(const fs::path& path) {
  // Without O_NONBLOCK the open of a pipe waits for a writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) fail_io("open", path, errno);
  PosixFile file(path, descriptor);
  if (!S_ISREG(file.status().st_mode))
    fail<IoError>("cannot read {}: it is not a regular file", path.string());
  return file;
}

PosixFile PosixFile::create(const fs::path& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail_io("replace", path, errno);
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor < 0) fail_io("create", path, errno);
  return {path, descriptor};
}

PosixFile PosixFile::create_nameless(std::string& name_template) {
  const int descriptor = ::mkostemp(name_template.data(), O_CLOEXEC);
  if (descriptor < 0) fail_io("create", name_template, errno);
  ::unlink(name_template.c_str());
  return {name_template, descriptor};
}

struct stat PosixFile::status() const {
  struct stat result {};
  if (::fstat(descriptor_, &result) != 0) fail_io("examine", path_, errno);
  return result;
}

int64_t PosixFile::read_at(std::span<std::byte> bytes, int64_t offset) const {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n =
        ::pread(descriptor_, bytes.data() + done, bytes.size() - done, offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_io("read", path_, errno);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return static_cast<int64_t>(done);
}

void PosixFile::append(std::span<const std::byte> bytes, int64_t needed_bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(descriptor_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_io("write", path_, errno, needed_bytes);
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void PosixFile::sync(int64_t needed_bytes) {
  while (::fsync(descriptor_) != 0) {
    if (errno != EINTR) fail_io("sync", path_, errno, needed_bytes);
  }
}

void PosixFile::close(int64_t needed_bytes) {
  if (::close(std::exchange(descriptor_, -1)) != 0 && errno != EINTR)
    fail_io("close", path_, errno, needed_bytes);
}

TemporaryFile::TemporaryFile(fs::path path, fs::path temporary, int64_t needed_bytes)
    : path_(std::move(path)),
      temporary_(std::move(temporary)),
      needed_bytes_(needed_bytes),
      file_(PosixFile::create(temporary_)) {}

TemporaryFile::~TemporaryFile() {
  if (!committed_) ::unlink(temporary_.c_str());
}

void TemporaryFile::commit() {
  file_.sync(needed_bytes_);
  file_.close(needed_bytes_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_io("rename the finished file to", path_, errno);
  committed_ = true;
  sync_directory(path_.parent_path());
}

}  // namespace isobath::io
