#include "progress.hpp"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "mpi_check.hpp"

namespace isobath::comm {
namespace {

// Short beside the steps of a pipeline, long beside a call.
constexpr std::chrono::microseconds kPeriod{500};

struct Mover {
  std::mutex mutex;
  std::condition_variable wake;
  std::thread thread;
  MPI_Comm own = MPI_COMM_NULL;  // on which nothing is ever sent
  int64_t n_pending = 0;
  bool stopping = false;
};

// Never destroyed: requests that an exception dropped may outlive every static object.
Mover& mover() {
  static Mover* const instance = new Mover;
  return *instance;
}

void move_transfers() {
  Mover& m = mover();
  std::unique_lock lock(m.mutex);
  while (!m.stopping) {
    if (m.n_pending == 0) {
      m.wake.wait(lock);
      continue;
    }
    lock.unlock();
    int found = 0;
    // Any call serves every pending transfer. The thread that waits for one of them meets its failure, too.
    static_cast<void>(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, m.own, &found, MPI_STATUS_IGNORE));
    lock.lock();
    m.wake.wait_for(lock, kPeriod, [&] { return m.stopping; });
  }
}

}  // namespace

void start_progress() {
  Mover& m = mover();
  ISOBATH_MPI(MPI_Comm_dup(MPI_COMM_SELF, &m.own));
  ISOBATH_MPI(MPI_Comm_set_errhandler(m.own, MPI_ERRORS_RETURN));
  m.stopping = false;
  m.thread = std::thread(move_transfers);
}

void stop_progress() {
  Mover& m = mover();
  if (!m.thread.joinable()) return;
  {
    const std::lock_guard lock(m.mutex);
    m.stopping = true;
  }
  m.wake.notify_all();
  m.thread.join();
  MPI_Comm_free(&m.own);
}

PendingTransfer::PendingTransfer() {
  Mover& m = mover();
  const std::lock_guard lock(m.mutex);
  if (++m.n_pending == 1) m.wake.notify_all();
}

PendingTransfer::~PendingTransfer() {
  const std::lock_guard lock(mover().mutex);
  --mover().n_pending;
}

}  // namespace isobath::comm
