#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace isobath::comm {

/// Ends the job when this rank waits for others longer than a limit without a reason: a network loss or a
/// stopped peer is otherwise a silent stall for ever. Beyond the limit it asks all ranks, whose watchdogs
/// answer while they compute; the job ends where one is silent or all of them wait, and the wait goes on
/// where one still works. Under an MPI without MPI_THREAD_MULTIPLE the limit alone decides. Armed by every
/// blocking wait of Communicator; names rank, host, stage of work, operation and the silent ranks.
class Watchdog {
 public:
  /// limit of 0 s: off, which ends the watching thread (the state before the first call, and after Runtime).
  /// Local.
  static void configure(std::chrono::seconds limit);
  /// What this rank is doing ("quantize, block 12, gate/up"), for the message.
  static void set_activity(std::string activity);

  /// Marks a wait for as long as it lives.
  class Guard {
   public:
    explicit Guard(const char* operation);
    ~Guard();
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    uint64_t id_ = 0;
  };
};

}  // namespace isobath::comm
