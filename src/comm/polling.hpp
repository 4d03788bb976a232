#pragma once
#include <chrono>
#include <isobath/comm/watchdog.hpp>

#include "mpi_check.hpp"

namespace isobath::comm {

/// Whether a rank that waits may keep its core, as MPI does by itself: the node has one for each of its
/// ranks. Until this is said waits soon sleep, which on oversubscribed ranks leaves the core to the awaited
/// rank, but makes it find a message late, and lets a long one through in small portions only.
void set_core_for_each_rank(bool has_core);

/// The pauses between two polls of one wait. Threads of the same rank get the core whenever they want it.
class Backoff {
 public:
  void pause();

 private:
  int n_pauses_ = 0;
  std::chrono::microseconds sleep_{10};
};

/// Polls until `done()` is true, watched by the watchdog under the name `operation`.
template <class Done>
void wait_until(const char* operation, Done&& done) {
  if (done()) return;
  const Watchdog::Guard guard(operation);
  for (Backoff backoff; !done();) backoff.pause();
}

/// Completes one request.
void wait_for(MPI_Request request, const char* operation);

}  // namespace isobath::comm
