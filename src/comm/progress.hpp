#pragma once

namespace isobath::comm {

/// Starts the thread that moves pending transfers while this rank computes. MPI hands a long message over in
/// pieces, and only while both ranks are inside one of its calls: without the thread a stage that computes
/// keeps its neighbour waiting for what it sent long ago. It enters MPI twice a millisecond while transfers
/// are pending and sleeps otherwise. Precondition: MPI grants MPI_THREAD_MULTIPLE.
void start_progress();
/// Ends the thread; to be called before MPI_Finalize. Nothing happens without one.
void stop_progress();

/// A transfer that the thread is to move, for as long as this object lives.
class PendingTransfer {
 public:
  PendingTransfer();
  ~PendingTransfer();
  PendingTransfer(const PendingTransfer&) = delete;
  PendingTransfer& operator=(const PendingTransfer&) = delete;
};

}  // namespace isobath::comm
