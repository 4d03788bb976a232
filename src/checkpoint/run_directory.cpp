#include <isobath/checkpoint/run_directory.hpp>

#include <fmt/ranges.h>

#include <isobath/core/error.hpp>
#include <isobath/core/version.hpp>
#include <isobath/io/files.hpp>

#include <chrono>
#include <set>
#include <thread>

#include "record.hpp"
#include "run_lock.hpp"

namespace isobath::checkpoint {
namespace fs = std::filesystem;
namespace {

constexpr const char* kRunFile = "run.json";
constexpr const char* kLastStage = "evaluate";
// Attribute caches of network file systems show a new file to other nodes only after some seconds.
constexpr auto kVisibilityLimit = std::chrono::seconds(10);

struct RunRecord {
  std::string version;
  Fingerprint fingerprint;
  std::set<std::string> complete;

  [[nodiscard]] std::string to_text() const {
    return seal(Json{{"format", "isobath run"},
                     {"isobath", version},
                     {"complete", complete},
                     {"fingerprint", fingerprint}});
  }

  static RunRecord from_text(const std::string& text, const std::string& source) {
    const Json json = unseal(text, source);
    try {
      return {json.at("isobath"), json.at("fingerprint").get<Fingerprint>(),
              json.at("complete").get<std::set<std::string>>()};
    } catch (const Json::exception& error) {
      fail<CheckpointError>("{} does not describe a run: {}", source, error.what());
    }
  }
};

/// Names of what stands in a directory and is neither a lock nor left by a job that died while it was
/// created.
std::set<std::string> contents(const fs::path& path) {
  std::set<std::string> names;
  std::error_code status;
  for (fs::directory_iterator entry(path, status), end; !status && entry != end; entry.increment(status)) {
    const std::string name = entry->path().filename().string();
    if (name != "lock" && name != "lock.tmp" && name != std::string(kRunFile) + ".tmp") names.insert(name);
  }
  if (status) fail<IoError>("cannot list {}: {}", path.string(), status.message());
  return names;
}

/// Refuses what a new run must not be mixed with.
void check_vacant(const fs::path& path) {
  const std::set<std::string> found = contents(path);
  if (found.empty()) return;
  if (!found.contains(kRunFile)) {
    std::string some;
    for (const std::string& name : found) {
      if (some.size() > 100) break;
      some += (some.empty() ? "" : ", ") + name;
    }
    fail<ConfigError>(
        "{} holds files that are not of a run ({}): a run needs an empty directory; choose another "
        "`output`, or empty it",
        path.string(), some);
  }
  const fs::path file = path / kRunFile;
  const RunRecord record = RunRecord::from_text(io::read_text(file), file.string());
  if (record.complete.contains(kLastStage)) {
    fail<ConfigError>("{} holds a finished run: choose another `output`, or delete the directory",
                      path.string());
  }
  fail<ConfigError>(
      "{} holds a run{}: continue it with --resume, choose another `output`, or delete the directory",
      path.string(),
      record.complete.empty() ? std::string()
                              : fmt::format(" (complete: {})", fmt::join(record.complete, ", ")));
}

void check_directory(const fs::path& path) {
  std::error_code status;
  if (fs::exists(path, status) && !fs::is_directory(path, status)) {
    fail<IoError>("the output {} is a file, a run needs a directory; choose another `output`", path.string());
  }
}

}  // namespace

struct RunDirectory::State {
  fs::path path;
  const comm::Communicator* comm;
  std::unique_ptr<RunLock> lock;  // of rank 0
  RunRecord record;

  void create(const Fingerprint& fingerprint);
  void resume(const Fingerprint& fingerprint);
  void check_visible() const;
};

void RunDirectory::State::create(const Fingerprint& fingerprint) {
  io::make_directories(path);
  const bool has_lock = fs::exists(path / "lock");
  if (!has_lock) check_vacant(path);
  lock = std::make_unique<RunLock>(path, comm->host());
  // Again, now that nobody else can change the answer.
  check_vacant(path);
  record = {kVersion, fingerprint, {}};
  io::write_text_atomically(path / kRunFile, record.to_text());
}

void RunDirectory::State::resume(const Fingerprint& fingerprint) {
  const fs::path file = path / kRunFile;
  std::error_code status;
  if (!fs::exists(file, status)) {
    fail<ConfigError>("there is no run to resume in {}: it has no {}; start it without --resume",
                      path.string(), kRunFile);
  }
  lock = std::make_unique<RunLock>(path, comm->host());
  record = RunRecord::from_text(io::read_text(file), file.string());
  Fingerprint then = record.fingerprint, now = fingerprint;
  then["isobath"] = record.version;
  now["isobath"] = kVersion;
  if (const std::string difference = differences(then, now); !difference.empty()) {
    fail<CheckpointError>(
        "{} was made by a different run:\n  {}\nrestore these values, or choose another `output`",
        path.string(), difference);
  }
}

void RunDirectory::State::check_visible() const {
  const auto limit = std::chrono::steady_clock::now() + kVisibilityLimit;
  std::error_code status;
  while (!fs::exists(path / kRunFile, status)) {
    if (std::chrono::steady_clock::now() > limit) {
      fail<IoError>(
          "{} was written by rank 0 but is not seen here; the output directory must be on a file system that "
          "all ranks share",
          (path / kRunFile).string());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

RunDirectory::RunDirectory(fs::path path, Mode mode, const Fingerprint& fingerprint,
                           const comm::Communicator& comm)
    : state_(std::make_unique<State>()) {
  state_->path = std::move(path);
  state_->comm = &comm;
  comm.agree_on([&] {
    if (comm.rank() != 0) return;
    check_directory(state_->path);
    mode == Mode::create ? state_->create(fingerprint) : state_->resume(fingerprint);
  });
  comm.agree_on([&] { state_->check_visible(); });
  std::string text = comm.rank() == 0 ? state_->record.to_text() : std::string();
  comm.broadcast(text, 0);
  state_->record = RunRecord::from_text(text, "the run record of rank 0");
}

RunDirectory::~RunDirectory() = default;
RunDirectory::RunDirectory(RunDirectory&&) noexcept = default;

const fs::path& RunDirectory::path() const {
  return state_->path;
}

bool RunDirectory::is_complete(const std::string& stage) const {
  return state_->record.complete.contains(stage);
}

void RunDirectory::mark_complete(const std::string& stage) {
  RunRecord record = state_->record;
  record.complete.insert(stage);
  state_->comm->agree_on([&] {
    if (state_->comm->rank() == 0) io::write_text_atomically(state_->path / kRunFile, record.to_text());
  });
  state_->record = std::move(record);
}

Fingerprint recorded_fingerprint(const fs::path& run) {
  const fs::path file = run / kRunFile;
  std::error_code status;
  if (!fs::is_regular_file(file, status)) return {};
  try {
    return RunRecord::from_text(io::read_text(file), file.string()).fingerprint;
  } catch (const Error&) {
    return {};  // who resumes it says why
  }
}

}  // namespace isobath::checkpoint
