#pragma once
#include <cstdint>
#include <isobath/comm/communicator.hpp>
#include <string>

#include "mpi_check.hpp"

namespace isobath::comm {

struct Communicator::State {
  /// Takes over `handle`, which must be private to the project: its error handler is replaced.
  State(MPI_Comm handle, int64_t message_limit);
  ~State();
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  MPI_Comm handle;
  int rank = 0;
  int size = 1;
  std::string host;
  int64_t message_limit;
};

/// MPI counts are `int`; 2^30 bytes also stay clear of transports that lose messages just below 2^31.
inline constexpr int64_t kDefaultMessageLimit = int64_t{1} << 30;

}  // namespace isobath::comm
