#pragma once
#include <chrono>
#include <cstdint>
#include <string>

namespace isobath::comm {

/// Ends the job when this rank waits for others longer than a limit: a network loss or a stopped peer is
/// otherwise a silent stall for ever. Armed by every blocking wait of Communicator; names rank, host, stage
/// of work and operation.
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
