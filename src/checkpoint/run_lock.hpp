#pragma once
#include <filesystem>
#include <string>

namespace isobath::checkpoint {

/// The file `lock` of a run directory: held from construction to destruction by one process on one host.
/// Local; rank 0 holds it.
///
/// A file made with O_EXCL, not flock alone: flock does not reach across the nodes of every network file
/// system, and a file can say who holds it.
class RunLock {
 public:
  /// Takes the lock, or takes over that of a holder that is certainly gone, with a warning; waits up to a
  /// minute for one that was killed and still gives its memory back. Throws ConfigError naming the holder
  /// when the directory is in use, IoError when the file cannot be written.
  RunLock(const std::filesystem::path& directory, const std::string& host);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  std::filesystem::path path_;
  std::string text_;
};

}  // namespace isobath::checkpoint
