#pragma once
#include <chrono>
#include <isobath/comm/watchdog.hpp>

#include "mpi_check.hpp"

namespace isobath::comm {

/// The pauses between two polls of one wait. A blocking MPI call keeps its core busy, which on oversubscribed
/// ranks is the core that the awaited rank needs.
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
