#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstring>
#include <fstream>
#include <isobath/checkpoint/run_directory.hpp>
#include <isobath/comm/communicator.hpp>
#include <nlohmann/json.hpp>
#include <optional>

#include "checkpoint/scratch.hpp"
#include "support/mpi_environment.hpp"

namespace isobath::checkpoint::test {
namespace {

namespace fs = std::filesystem;
using isobath::testing::world;
using Json = nlohmann::ordered_json;
using Mode = RunDirectory::Mode;

const Fingerprint kFingerprint{{"quantization.bits", "3"}, {"calibration.seed", "0"}};

class RunDirectoryOnDisk : public ::testing::Test {
 protected:
  [[nodiscard]] fs::path path() const { return scratch_.path() / "runs" / "one"; }
  [[nodiscard]] RunDirectory open(Mode mode, const Fingerprint& fingerprint = kFingerprint) const {
    return RunDirectory(path(), mode, fingerprint, world());
  }
  std::string refusal(Mode mode, ExitCode code, const Fingerprint& fingerprint = kFingerprint) const {
    return expect_agreed_failure(world(), code, [&] { static_cast<void>(open(mode, fingerprint)); });
  }
  /// Leaves a lock like that of a job that was killed, changed by `edit`.
  template <class Edit>
  void leave_lock(Edit&& edit) const {
    std::string text;
    {
      const RunDirectory holder = open(fs::exists(path() / "run.json") ? Mode::resume : Mode::create);
      world().barrier();
      text = read_bytes(path() / "lock");
      world().barrier();
    }
    on_root(world(), [&] {
      Json lock = Json::parse(text);
      edit(lock);
      write_bytes(path() / "lock", lock.dump());
    });
  }
  static void expect_contains(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
      EXPECT_NE(text.find(part), std::string::npos) << part << " in: " << text;
  }

  Scratch scratch_{world()};
};

TEST_F(RunDirectoryOnDisk, IsMadeWithALockThatGoesWhenTheRunEnds) {
  {
    const RunDirectory directory = open(Mode::create);
    EXPECT_EQ(directory.path(), path());
    EXPECT_TRUE(fs::exists(path() / "run.json"));
    EXPECT_TRUE(fs::exists(path() / "lock"));
    EXPECT_FALSE(directory.is_complete("measure"));
    world().barrier();
  }
  world().barrier();
  EXPECT_FALSE(fs::exists(path() / "lock"));
}

TEST_F(RunDirectoryOnDisk, CompleteStagesAreFoundAgain) {
  {
    RunDirectory directory = open(Mode::create);
    directory.mark_complete("measure");
    EXPECT_TRUE(directory.is_complete("measure"));
  }
  RunDirectory directory = open(Mode::resume);
  EXPECT_TRUE(directory.is_complete("measure"));
  EXPECT_FALSE(directory.is_complete("quantize"));
  directory.mark_complete("quantize");
  const RunDirectory moved = std::move(directory);
  EXPECT_TRUE(moved.is_complete("quantize"));
  EXPECT_TRUE(fs::exists(path() / "lock"));
  world().barrier();
}

TEST_F(RunDirectoryOnDisk, AnExistingRunIsNotOverwritten) {
  { open(Mode::create).mark_complete("measure"); }
  expect_contains(refusal(Mode::create, ExitCode::config),
                  {path().string(), "holds a run (complete: measure)", "--resume", "`output`", "delete"});
  {
    RunDirectory directory = open(Mode::resume);
    directory.mark_complete("quantize");
    directory.mark_complete("evaluate");
  }
  expect_contains(refusal(Mode::create, ExitCode::config), {"finished run", "`output`", "delete"});
  world().barrier();
  EXPECT_FALSE(fs::exists(path() / "lock")) << "a refused run must not leave a lock";
}

TEST_F(RunDirectoryOnDisk, AnEmptyDirectoryIsTakenOneWithOtherFilesIsNot) {
  on_root(world(), [&] { fs::create_directories(path()); });
  { const RunDirectory directory = open(Mode::create); }
  on_root(world(), [&] {
    fs::remove(path() / "run.json");
    write_bytes(path() / "thesis.tex", "irreplaceable");
  });
  expect_contains(refusal(Mode::create, ExitCode::config), {"thesis.tex", "empty"});
  EXPECT_EQ(read_bytes(path() / "thesis.tex"), "irreplaceable");
  EXPECT_FALSE(fs::exists(path() / "run.json"));
}

TEST_F(RunDirectoryOnDisk, ADirectoryInUseIsRefusedNamingTheHolder) {
  const RunDirectory holder = open(Mode::create);
  std::string pid = std::to_string(::getpid());
  world().broadcast(pid, 0);
  std::string host = world().host();
  world().broadcast(host, 0);
  for (const Mode mode : {Mode::create, Mode::resume}) {
    expect_contains(refusal(mode, ExitCode::config),
                    {"in use by process " + pid + " on " + host, "`output`", "lock"});
  }
  world().barrier();
  EXPECT_TRUE(fs::exists(path() / "lock")) << "the refused run took the lock of the first away";
  world().barrier();
}

TEST_F(RunDirectoryOnDisk, TheLockOfADeadHolderIsTakenOverWithAWarning) {
  static constexpr int64_t kAbovePidMax = int64_t{1} << 30;
  const std::vector<std::function<void(Json&)>> deaths = {[](Json& lock) { lock["pid"] = kAbovePidMax; },
                                                          [](Json& lock) { lock["pid_start"] = "1"; },
                                                          [](Json& lock) { lock["boot"] = "another"; }};
  for (const auto& death : deaths) {
    leave_lock(death);
    ::testing::internal::CaptureStderr();
    { const RunDirectory directory = open(Mode::resume); }
    std::string text = ::testing::internal::GetCapturedStderr();
    world().broadcast(text, 0);
    expect_contains(text, {"warning", "taking over", path().string()});
    world().barrier();
    EXPECT_FALSE(fs::exists(path() / "lock"));
    world().barrier();
  }
}

/// A process with so much memory that it is not gone at once when it is killed.
class LargeProcess {
 public:
  LargeProcess() {
    std::array<int, 2> ready{};
    if (::pipe(ready.data()) != 0) throw std::runtime_error("pipe");
    pid_ = ::fork();
    if (pid_ == 0) {
      constexpr size_t kBytes = size_t{512} << 20;
      void* memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      std::memset(memory, 1, kBytes);
      static_cast<void>(::write(ready[1], "r", 1));
      while (true) ::pause();
    }
    char byte = 0;
    if (::read(ready[0], &byte, 1) != 1) throw std::runtime_error("read");
    for (const int end : ready) ::close(end);
    std::ifstream stat("/proc/" + std::to_string(pid_) + "/stat");
    constexpr int kStartField = 22;
    for (int field = 1; field <= kStartField; ++field) stat >> start_;
  }
  ~LargeProcess() { ::waitpid(pid_, nullptr, 0); }
  LargeProcess(const LargeProcess&) = delete;
  LargeProcess& operator=(const LargeProcess&) = delete;
  void kill() const { ::kill(pid_, SIGKILL); }
  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] const std::string& start() const { return start_; }

 private:
  pid_t pid_;
  std::string start_;
};

TEST_F(RunDirectoryOnDisk, AKilledHolderThatIsStillEndingIsWaitedFor) {
  std::optional<LargeProcess> holder;
  leave_lock([&](Json& lock) {
    holder.emplace();
    lock["pid"] = holder->pid();
    lock["pid_start"] = holder->start();
  });
  expect_contains(refusal(Mode::resume, ExitCode::config), {"in use by process"});
  world().barrier();
  if (holder) holder->kill();
  EXPECT_EQ(open(Mode::resume).path(), path());
}

TEST_F(RunDirectoryOnDisk, TheLockOfAnotherHostIsRespected) {
  leave_lock([](Json& lock) {
    lock["host"] = "node-far-away";
    lock["pid_start"] = "1";
  });
  expect_contains(refusal(Mode::resume, ExitCode::config), {"node-far-away", "delete"});
  world().barrier();
  EXPECT_TRUE(fs::exists(path() / "lock"));
}

TEST_F(RunDirectoryOnDisk, AJobThatSlurmRestartedElsewhereTakesItsOwnLockOver) {
  leave_lock([](Json& lock) {
    lock["host"] = "node-that-died";
    lock["slurm_job"] = "4711";
    lock["slurm_restart"] = "";
  });
  setenv("SLURM_JOB_ID", "4711", 1);
  expect_contains(refusal(Mode::resume, ExitCode::config), {"node-that-died"});
  setenv("SLURM_RESTART_COUNT", "1", 1);
  { const RunDirectory directory = open(Mode::resume); }
  unsetenv("SLURM_JOB_ID");
  unsetenv("SLURM_RESTART_COUNT");
}

TEST_F(RunDirectoryOnDisk, AnIncompleteLockIsRespectedWhileItIsYoung) {
  { const RunDirectory directory = open(Mode::create); }
  on_root(world(), [&] { write_bytes(path() / "lock", "{\"host\": "); });
  expect_contains(refusal(Mode::resume, ExitCode::config), {"in use", "lock"});
  on_root(world(), [&] {
    fs::last_write_time(path() / "lock", fs::file_time_type::clock::now() - std::chrono::minutes(5));
  });
  { const RunDirectory directory = open(Mode::resume); }
}

TEST_F(RunDirectoryOnDisk, AnotherConfigurationIsRefusedByNameWithBothValues) {
  { const RunDirectory directory = open(Mode::create); }
  const std::string message =
      refusal(Mode::resume, ExitCode::checkpoint,
              {{"quantization.bits", "4"}, {"calibration.seed", "0"}, {"extra", "x"}});
  expect_contains(message, {"quantization.bits: 3 in the run, 4 now", "extra: absent in the run, x now"});
  EXPECT_EQ(message.find("calibration.seed"), std::string::npos) << message;
  world().barrier();
  EXPECT_FALSE(fs::exists(path() / "lock"));
}

TEST_F(RunDirectoryOnDisk, NothingToResumeIsSaid) {
  expect_contains(refusal(Mode::resume, ExitCode::config),
                  {"no run to resume", path().string(), "without --resume"});
  EXPECT_FALSE(fs::exists(path()));
}

TEST_F(RunDirectoryOnDisk, ADamagedRunFileIsAnInvalidCheckpoint) {
  { const RunDirectory directory = open(Mode::create); }
  on_root(world(), [&] { fs::resize_file(path() / "run.json", 40); });
  expect_contains(refusal(Mode::resume, ExitCode::checkpoint), {"run.json", "damaged"});
}

TEST_F(RunDirectoryOnDisk, AFileInItsPlaceIsAnIoError) {
  on_root(world(), [&] {
    fs::create_directories(path().parent_path());
    write_bytes(path(), "a file");
  });
  expect_contains(refusal(Mode::create, ExitCode::io), {path().string(), "is a file"});
}

TEST_F(RunDirectoryOnDisk, AParentThatCannotHoldItIsAnIoError) {
  // Works for root too, whom permissions do not stop.
  expect_contains(
      expect_agreed_failure(
          world(), ExitCode::io,
          [&] { static_cast<void>(RunDirectory("/proc/isobath-test/run", Mode::create, {}, world())); }),
      {"/proc/isobath-test"});
}

TEST_F(RunDirectoryOnDisk, OfManyThatResumeAfterACrashOneGetsTheLock) {
  leave_lock([](Json& lock) { lock["pid_start"] = "1"; });
  const comm::Communicator alone = world().split(world().rank(), 0);
  constexpr int kRaces = 20;
  for (int race = 0; race < kRaces; ++race) {
    int32_t winner = 0;
    std::optional<RunDirectory> held;
    try {
      held.emplace(path(), Mode::resume, kFingerprint, alone);
      winner = 1;
    } catch (const AgreedFailure& failure) {
      EXPECT_EQ(static_cast<int>(failure.code()), static_cast<int>(ExitCode::config)) << failure.what();
    }
    EXPECT_EQ(world().all_reduce(winner, comm::Reduce::sum), 1);
    // The winner dies with a stale lock in place.
    std::string text = read_bytes(path() / "lock");
    world().barrier();
    held.reset();
    on_root(world(), [&] {
      Json lock = Json::parse(text);
      lock["pid_start"] = "1";
      write_bytes(path() / "lock", lock.dump());
    });
  }
}

}  // namespace
}  // namespace isobath::checkpoint::test
