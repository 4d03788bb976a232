#pragma once
#include <cstdint>
#include <string>
#include <vector>

/// A timeline of what this rank does, off unless `start` was called: then a span costs two clock readings.
namespace isobath::trace {

/// One thing that was done: from `begin_us`, microseconds since `start`.
struct Event {
  const char* name;
  int64_t number;  ///< block, microbatch … or −1
  double begin_us, duration_us;
};

/// Begins a recording; call it on all ranks right after a barrier, so that their times compare.
void start();
[[nodiscard]] bool is_on();
/// Ends the recording and hands it over, in the order in which spans ended.
[[nodiscard]] std::vector<Event> stop();

/// Records the time between construction and destruction. For the thread that drives the rank; `name` must
/// outlive the recording.
class Span {
 public:
  explicit Span(const char* name, int64_t number = -1);
  ~Span();
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;

 private:
  const char* name_;
  int64_t number_;
  double begin_us_;
};

}  // namespace isobath::trace
