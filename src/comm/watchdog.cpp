#include <isobath/comm/watchdog.hpp>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <map>
#include <mutex>
#include <thread>

#include "watchdog_hooks.hpp"

namespace isobath::comm {
namespace {

using Clock = std::chrono::steady_clock;

struct Wait {
  const char* operation;
  Clock::time_point since;
};

struct Watch {
  std::mutex mutex;
  std::condition_variable wake;
  std::thread thread;
  bool stopping = false;
  std::atomic<int64_t> limit_s{0};
  std::map<uint64_t, Wait> waits;  // ascending ids: the first is the oldest
  uint64_t last_id = 0;
  std::string activity = "starting";
  int rank = 0;
  std::string host = "unknown host";
  void (*end_job)(int) = [](int exit_code) { _exit(exit_code); };
};

// Never destroyed: the thread may be the one that ends the process, and must not then destroy itself.
Watch& watch() {
  static Watch* const instance = new Watch;
  return *instance;
}

void run_watch() {
  Watch& w = watch();
  std::unique_lock lock(w.mutex);
  while (!w.stopping) {
    const std::chrono::seconds limit(w.limit_s);
    if (!w.waits.empty()) {
      const Wait oldest = w.waits.begin()->second;
      const auto waited = Clock::now() - oldest.since;
      if (waited > limit) {
        log::error(
            "rank {} ({}) has waited {:.0f} s in '{}' during '{}', longer than the limit of {} s: another "
            "rank stopped "
            "or the network failed. The job ends; look for the rank that gave no such message, and continue "
            "with --resume.",
            w.rank, w.host, std::chrono::duration<double>(waited).count(), oldest.operation, w.activity,
            limit.count());
        w.end_job(static_cast<int>(ExitCode::internal));
      }
    }
    w.wake.wait_for(
        lock, std::clamp<Clock::duration>(limit / 8, std::chrono::milliseconds(50), std::chrono::seconds(1)));
  }
}

}  // namespace

void Watchdog::configure(std::chrono::seconds limit) {
  Watch& w = watch();
  std::thread ended;
  {
    const std::lock_guard lock(w.mutex);
    w.limit_s = limit.count();
    w.stopping = limit.count() == 0;
    if (w.stopping) {
      w.waits.clear();
      ended.swap(w.thread);
    } else if (!w.thread.joinable()) {
      w.thread = std::thread(run_watch);
    }
  }
  w.wake.notify_all();
  if (ended.joinable()) ended.join();
}

void Watchdog::set_activity(std::string activity) {
  const std::lock_guard lock(watch().mutex);
  watch().activity = std::move(activity);
}

Watchdog::Guard::Guard(const char* operation) {
  Watch& w = watch();
  if (w.limit_s.load(std::memory_order_relaxed) == 0) return;
  const std::lock_guard lock(w.mutex);
  id_ = ++w.last_id;
  w.waits.emplace(id_, Wait{operation, Clock::now()});
}

Watchdog::Guard::~Guard() {
  if (id_ == 0) return;
  const std::lock_guard lock(watch().mutex);
  watch().waits.erase(id_);
}

void set_watchdog_identity(int rank, std::string host, void (*end_job)(int)) {
  Watch& w = watch();
  const std::lock_guard lock(w.mutex);
  w.rank = rank;
  w.host = std::move(host);
  w.end_job = end_job;
}

}  // namespace isobath::comm
