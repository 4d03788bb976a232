#pragma once
#include <isobath/comm/communicator.hpp>

namespace isobath::comm {

/// Owns MPI: initialises it, finalizes it in the destructor unless an exception is in flight, and is the only
/// place that names the world communicator.
class Runtime {
 public:
  Runtime(int& argc, char**& argv);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  [[nodiscard]] const Communicator& world() const;
  /// Ends all ranks at once with `code` (MPI_Abort). The only correct end for a failure that the others do
  /// not know of: a rank that leaves by finalizing lets them hang.
  [[noreturn]] void abort(ExitCode code) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace isobath::comm
