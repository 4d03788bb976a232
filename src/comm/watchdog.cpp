#include <isobath/comm/watchdog.hpp>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "inquiry.hpp"
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
  std::unique_ptr<Inquiry> inquiry;  // changed only while there is no thread
  int rank = 0;
  std::string host = "unknown host";
  void (*end_job)(int) = [](int exit_code) { _exit(exit_code); };
};

// Never destroyed: the thread may be the one that ends the process, and must not then destroy itself.
Watch& watch() {
  static Watch* const instance = new Watch;
  return *instance;
}

/// The longest wait of this rank.
struct Stall {
  uint64_t id;
  Clock::duration lasted;
  std::string doing;  // "'barrier' during 'quantize, block 12'"
};

std::optional<Stall> longest_wait(const Watch& w) {
  if (w.waits.empty()) return std::nullopt;
  const auto& [id, wait] = *w.waits.begin();
  return Stall{id, Clock::now() - wait.since, fmt::format("'{}' during '{}'", wait.operation, w.activity)};
}

Sign sign_of(const Watch& w, const std::optional<Stall>& stall) {
  Sign sign{};
  if (stall) sign.waited_ms = std::chrono::ceil<std::chrono::milliseconds>(stall->lasted).count();
  const std::string& text = stall ? stall->doing : w.activity;
  text.copy(sign.doing, sizeof(sign.doing) - 1);
  return sign;
}

/// Decides whether a wait beyond the limit has a reason: some rank still works, and all are there.
class Suspicion {
 public:
  /// Why the job must end, or nothing. To be called again and again.
  std::string examine(const Stall& stall, std::chrono::seconds limit, const Watch& w) {
    const std::string waited = fmt::format("rank {} ({}) has waited {:.0f} s in {}", w.rank, w.host,
                                           std::chrono::duration<double>(stall.lasted).count(), stall.doing);
    const std::string beyond = fmt::format("{}, longer than the limit of {} s", waited, limit.count());
    if (!w.inquiry) {
      return beyond +
             ": another rank stopped or the network failed. The job ends; look for the rank that gave no "
             "such message, and continue with --resume.";
    }
    const Clock::time_point now = Clock::now();
    if (stall.id != id_) *this = Suspicion(stall.id, now);
    if (!has_asked_) {
      if (now >= ask_at_) {
        w.inquiry->ask();
        has_asked_ = true;
        asked_ = now;
      }
      return {};
    }
    // Others look once a second; a rank whose cores are taken by others may come late.
    const auto patience = std::clamp(limit / 10, std::chrono::seconds(2), std::chrono::seconds(60));
    const bool all = w.inquiry->all_answered();
    if (!all && now - asked_ < patience) return {};
    has_asked_ = false;
    bool a_lower_rank_sees_it = false;
    std::string who_works;
    for (const auto& [rank, sign] : w.inquiry->answers()) {
      const bool stalled = std::chrono::milliseconds(sign.waited_ms) > limit;
      a_lower_rank_sees_it |= stalled && rank < w.rank;
      if (!stalled && who_works.empty())
        who_works = fmt::format("{} still works ({})", w.inquiry->name_of(rank), sign.doing);
    }
    // One message is enough.
    if (all && !who_works.empty()) {
      if (!a_lower_rank_sees_it) log::warning("{}: {}", waited, who_works);
      ask_at_ = now + limit;
      return {};
    }
    if (a_lower_rank_sees_it && stall.lasted < limit + 4 * patience) return {};
    return all ? beyond +
                     ", and so have all others: a message was lost. The job ends; continue with --resume."
               : fmt::format(
                     "{}, and no answer comes from {}: stopped, or cut off by the network. The job ends; "
                     "continue with --resume.",
                     beyond, w.inquiry->silent_ranks());
  }

  Suspicion() = default;

 private:
  Suspicion(uint64_t id, Clock::time_point ask_at) : id_(id), ask_at_(ask_at) {}

  uint64_t id_ = 0;
  Clock::time_point ask_at_, asked_;
  bool has_asked_ = false;
};

void run_watch() {
  Watch& w = watch();
  Suspicion suspicion;
  std::unique_lock lock(w.mutex);
  while (!w.stopping) {
    const std::chrono::seconds limit(w.limit_s);
    const std::optional<Stall> stall = longest_wait(w);
    const Sign self = sign_of(w, stall);
    lock.unlock();
    if (w.inquiry) w.inquiry->serve(self);
    if (stall && stall->lasted > limit) {
      const std::string verdict = suspicion.examine(*stall, limit, w);
      if (!verdict.empty()) {
        log::error("{}", verdict);
        w.end_job(static_cast<int>(ExitCode::internal));
      }
    }
    lock.lock();
    w.wake.wait_for(
        lock, std::clamp<Clock::duration>(limit / 8, std::chrono::milliseconds(50), std::chrono::seconds(1)),
        [&] { return w.stopping; });
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

void set_watchdog_inquiry(std::unique_ptr<Inquiry> inquiry) {
  Watch& w = watch();
  const std::lock_guard lock(w.mutex);
  ISOBATH_CHECK(!w.thread.joinable(), "the inquiry changes while the watchdog runs");
  w.inquiry = std::move(inquiry);
}

}  // namespace isobath::comm
