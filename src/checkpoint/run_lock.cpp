#include "run_lock.hpp"

#include <fcntl.h>
#include <fmt/chrono.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <isobath/io/files.hpp>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string_view>
#include <thread>

namespace isobath::checkpoint {
namespace fs = std::filesystem;
namespace {

using Json = nlohmann::ordered_json;

// A lock is written within microseconds of being created; one still empty after this long was left by a crash
// in between.
constexpr auto kEmptyLockGrace = std::chrono::seconds(60);
constexpr int kAttempts = 40;
constexpr auto kPause = std::chrono::milliseconds(25);
// A killed process that held many GiB takes seconds to give them back, and mpirun does not always wait for
// it.
constexpr auto kEndingGrace = std::chrono::seconds(60);

struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
};

std::string first_line(const fs::path& path) {
  std::ifstream stream(path);
  std::string line;
  std::getline(stream, line);
  return line;
}

/// Clock ticks from boot to the start of a process, as text: with it a process id is never mistaken for a
/// reused one. Empty when there is no such process or only its zombie is left.
std::string start_of_process(int64_t pid) {
  const std::string line = first_line(fmt::format("/proc/{}/stat", pid));
  const size_t after_name = line.rfind(')');
  if (after_name == std::string::npos) return {};
  std::istringstream fields(line.substr(after_name + 1));
  constexpr int kStateField = 3, kStartField = 22;
  std::string field;
  for (int index = kStateField; index <= kStartField; ++index) {
    fields >> field;
    if (index == kStateField && (field == "Z" || field == "X")) return {};
  }
  return field;
}

/// Whether a process was killed but is not gone yet: SIGKILL is pending, or the kernel tears it down.
bool is_ending(int64_t pid) {
  const std::string line = first_line(fmt::format("/proc/{}/stat", pid));
  const size_t after_name = line.rfind(')');
  if (after_name == std::string::npos) return true;
  std::istringstream fields(line.substr(after_name + 1));
  constexpr int kStateField = 3, kFlagsField = 9;
  constexpr uint64_t kExiting = 0x4;  // PF_EXITING of the kernel
  std::string skipped;
  for (int index = kStateField; index < kFlagsField; ++index) fields >> skipped;
  uint64_t flags = 0;
  fields >> flags;
  if ((flags & kExiting) != 0) return true;

  std::ifstream status(fmt::format("/proc/{}/status", pid));
  for (std::string key, value; status >> key && std::getline(status, value);) {
    if (key != "SigPnd:" && key != "ShdPnd:") continue;
    constexpr int kHexadecimal = 16;
    if ((std::stoull(value, nullptr, kHexadecimal) >> (SIGKILL - 1) & 1U) != 0) return true;
  }
  return false;
}

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

std::string pid_namespace() {
  std::error_code status;
  return fs::read_symlink("/proc/self/ns/pid", status).string();
}

Json own_identity(const std::string& host) {
  const int64_t pid = ::getpid();
  return Json{{"host", host},
              {"pid", pid},
              {"pid_start", start_of_process(pid)},
              {"boot", first_line("/proc/sys/kernel/random/boot_id")},
              {"pid_namespace", pid_namespace()},
              {"started", fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)))},
              {"slurm_job", environment("SLURM_JOB_ID")},
              {"slurm_restart", environment("SLURM_RESTART_COUNT")}};
}

/// Whether process ids of the holder mean something here.
bool is_of_this_host(const Json& holder, const Json& self) {
  return holder.at("host") == self.at("host") && holder.at("boot") == self.at("boot") &&
         holder.at("pid_namespace") == self.at("pid_namespace");
}

/// Why the holder cannot be at work any more; empty when it may be.
std::string why_gone(const Json& holder, const Json& self) {
  if (const std::string job = holder.at("slurm_job");
      !job.empty() && job == self.at("slurm_job") && holder.at("slurm_restart") != self.at("slurm_restart")) {
    return fmt::format("Slurm restarted job {}", job);
  }
  if (holder.at("host") == self.at("host") && holder.at("boot") != self.at("boot"))
    return "its host was restarted";
  if (!is_of_this_host(holder, self)) return {};
  const int64_t pid = holder.at("pid");
  const std::string start = start_of_process(pid);
  if (start.empty() || (::kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH))
    return "that process has ended";
  if (start != holder.at("pid_start")) return "that process has ended and its id is used by another";
  return {};
}

struct Verdict {
  std::string holder;    ///< for messages
  std::string why_gone;  ///< empty: in use
  bool is_ending = false;
};

Verdict judge(const std::string& text, const struct stat& status, const Json& self) {
  const Json holder = Json::parse(text, nullptr, false);
  try {
    Verdict verdict{
        fmt::format("process {} on {} since {}", holder.at("pid").get<int64_t>(),
                    holder.at("host").get<std::string>(), holder.at("started").get<std::string>()),
        why_gone(holder, self)};
    verdict.is_ending =
        verdict.why_gone.empty() && is_of_this_host(holder, self) && is_ending(holder.at("pid"));
    return verdict;
  } catch (const Json::exception&) {
    const auto age = std::chrono::seconds(std::time(nullptr) - status.st_mtime);
    return {"a job whose lock cannot be read", age > kEmptyLockGrace ? "its lock was never completed" : ""};
  }
}

std::string read_all(int descriptor) {
  std::string text(4096, '\0');
  const ssize_t n = ::pread(descriptor, text.data(), text.size(), 0);
  text.resize(n > 0 ? static_cast<size_t>(n) : 0);
  return text;
}

bool create_exclusively(const fs::path& path, const std::string& text) {
  const Descriptor file{::open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644)};
  if (file.value < 0 && errno == EEXIST) return false;
  if (file.value < 0) fail<IoError>("cannot create {}: {}", path.string(), std::strerror(errno));
  const ssize_t written = ::write(file.value, text.data(), text.size());
  if (written == static_cast<ssize_t>(text.size()) && ::fsync(file.value) == 0) return true;
  const int reason = written >= 0 && written < static_cast<ssize_t>(text.size()) ? ENOSPC : errno;
  ::unlink(path.c_str());
  fail<IoError>("cannot write {}: {}", path.string(), std::strerror(reason));
}

enum class Outcome { taken, changed, ending };

/// Replaces the lock of a holder that is gone. flock on the old file keeps two jobs of one host from doing so
/// at once; the name `lock` exists all the time, so that O_EXCL keeps everybody else out.
Outcome take_over(const fs::path& path, const std::string& text, const Json& self, bool may_wait) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.value < 0 || (::flock(file.value, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK))
    return Outcome::changed;
  struct stat opened {
  }, named{};
  if (::fstat(file.value, &opened) != 0 || ::stat(path.c_str(), &named) != 0 ||
      opened.st_ino != named.st_ino) {
    return Outcome::changed;
  }
  const Verdict verdict = judge(read_all(file.value), opened, self);
  if (verdict.is_ending && may_wait) return Outcome::ending;
  if (verdict.why_gone.empty()) {
    fail<ConfigError>(
        "{} is in use by {}; wait for that job or stop it, or choose another `output` (if it is certainly "
        "gone, delete {})",
        path.parent_path().string(), verdict.holder, path.string());
  }
  log::warning("taking over {} from {}: {}", path.parent_path().string(), verdict.holder, verdict.why_gone);
  io::write_text_atomically(path, text);
  return Outcome::taken;
}

}  // namespace

RunLock::RunLock(const fs::path& directory, const std::string& host) : path_(directory / "lock") {
  const Json self = own_identity(host);
  text_ = self.dump(2) + "\n";
  const auto deadline = std::chrono::steady_clock::now() + kEndingGrace;
  for (int attempt = 0; attempt < kAttempts;) {
    if (create_exclusively(path_, text_)) return;
    const Outcome outcome = take_over(path_, text_, self, std::chrono::steady_clock::now() < deadline);
    if (outcome == Outcome::taken) return;
    if (outcome == Outcome::changed) ++attempt;
    std::this_thread::sleep_for(kPause);
  }
  fail<ConfigError>("{} changes hands all the time: another job starts in it; choose another `output`",
                    directory.string());
}

RunLock::~RunLock() {
  const Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC)};
  // Whoever took the lock over by hand keeps it.
  if (file.value >= 0 && read_all(file.value) == text_) ::unlink(path_.c_str());
}

}  // namespace isobath::checkpoint
