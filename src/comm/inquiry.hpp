#pragma once
#include <cstdint>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "mpi_check.hpp"

namespace isobath::comm {

/// What a rank says of itself when another one asks.
struct Sign {
  int64_t waited_ms;  ///< of its longest wait; 0: it waits for nobody
  char doing[160];    ///< what it does, for the reader of a message; ends with 0
};

/// Asks all other ranks whether they are there, and answers those that ask. Used by one thread, beside
/// others that call MPI: needs MPI_THREAD_MULTIPLE. An error of MPI counts as silence.
class Inquiry {
 public:
  /// `own`: a communicator of all ranks that nobody else uses; taken over. `hosts`: by rank.
  Inquiry(MPI_Comm own, std::vector<std::string> hosts);
  /// Local: others need not have ended theirs.
  ~Inquiry();
  Inquiry(const Inquiry&) = delete;
  Inquiry& operator=(const Inquiry&) = delete;

  /// Answers what was asked of this rank and takes answers. Does not block.
  void serve(const Sign& self);
  /// Starts to ask; answers to earlier questions no longer count. Does not block.
  void ask();

  /// By rank, since the last ask().
  [[nodiscard]] const std::map<int, Sign>& answers() const { return answers_; }
  [[nodiscard]] bool all_answered() const { return static_cast<int>(answers_.size()) == n_ranks() - 1; }
  /// "rank 3 (node17), rank 5 (node18)": ranks that have not answered, not more than four.
  [[nodiscard]] std::string silent_ranks() const;
  /// "rank 3 (node17)".
  [[nodiscard]] std::string name_of(int rank) const;

 private:
  struct Message {
    int64_t number;  // of the question
    Sign sign;       // only of an answer
  };
  struct Sent {
    Message message;
    MPI_Request request;
  };

  [[nodiscard]] int n_ranks() const { return static_cast<int>(hosts_.size()); }
  void send(int rank, int tag, const Message& message);

  MPI_Comm own_;
  std::vector<std::string> hosts_;
  int rank_ = 0;
  int64_t number_ = 0;
  std::map<int, Sign> answers_;
  std::list<Sent> sent_;  // until MPI has no use for them
};

}  // namespace isobath::comm
