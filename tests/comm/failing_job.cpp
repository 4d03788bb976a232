// Jobs that end badly on purpose, checked from outside by expect_failing_job.cmake.
#include <ATen/ATen.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <ctime>
#include <isobath/comm/runtime.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <thread>

namespace {

using isobath::comm::Communicator;
using isobath::comm::Watchdog;

constexpr std::chrono::seconds kWaitLimit{2};

/// Rank 1 stands still and never arrives; the watchdog of the others has to end the job.
void stop_rank_1(const Communicator& world) {
  Watchdog::configure(kWaitLimit);
  Watchdog::set_activity("quantize, block 12");
  if (world.rank() == 1) std::raise(SIGSTOP);
  world.barrier();
}

/// Rank 1 arrives long after the limit, but it works: no failure.
void work_on_rank_1(const Communicator& world) {
  Watchdog::configure(kWaitLimit);
  Watchdog::set_activity("quantize, block 12");
  if (world.rank() == 1) std::this_thread::sleep_for(3 * kWaitLimit);
  world.barrier();
  if (world.rank() == 0) isobath::log::info("all arrived");
}

/// Every rank waits for what nobody sends.
void wait_for_each_other(const Communicator& world) {
  Watchdog::configure(kWaitLimit);
  at::Tensor message = at::zeros({1});
  world.receive(message, (world.rank() + 1) % world.size(), 0);
}

/// Rank 2 fails alone; the others wait for it.
void abort_on_rank_2(const isobath::comm::Runtime& runtime) {
  if (runtime.world().rank() == 2) {
    isobath::log::error("rank 2 reports a numeric failure");
    runtime.abort(isobath::ExitCode::numeric);
  }
  runtime.world().barrier();
}

void throw_on_rank_1(const Communicator& world) {
  if (world.rank() == 1) throw isobath::IoError("thrown on rank 1");
  world.barrier();
}

int end_by_agreement(const Communicator& world) {
  try {
    world.agree_on([&] {
      if (world.rank() == 1) throw isobath::ConfigError("no file");
      if (world.rank() == 3) throw isobath::DataError("no space");
    });
  } catch (const isobath::AgreedFailure& failure) {
    if (world.rank() == 0) isobath::log::error("{}", failure.what());
    return static_cast<int>(failure.code());
  }
  return 0;
}

int run(int argc, char** argv) {
  const isobath::comm::Runtime runtime(argc, argv);
  const Communicator& world = runtime.world();
  isobath::log::configure(world.rank(), world.size(), isobath::log::Level::info);
  const char* job = argc > 1 ? argv[1] : "";
  // The time limit of the test counts from here: starting the ranks takes long on a busy machine, and is not
  // at issue.
  world.barrier();
  if (world.rank() == 0) isobath::log::info("failure begins at {}", std::time(nullptr));
  if (std::strcmp(job, "stopped_rank") == 0) stop_rank_1(world);
  if (std::strcmp(job, "working_rank") == 0) work_on_rank_1(world);
  if (std::strcmp(job, "deadlock") == 0) wait_for_each_other(world);
  if (std::strcmp(job, "abort") == 0) abort_on_rank_2(runtime);
  if (std::strcmp(job, "unwinding") == 0) throw_on_rank_1(world);
  if (std::strcmp(job, "agreed") == 0) return end_by_agreement(world);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const isobath::Error& error) {
    // Runtime has unwound without finalizing: the launcher must end the ranks that still wait.
    isobath::log::error("{}", error.what());
    return static_cast<int>(error.code());
  }
}
