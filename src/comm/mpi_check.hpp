#pragma once
#include <mpi.h>

#include <source_location>

namespace isobath::comm {

/// Throws InternalError with the text of the call, MPI's own text and the place.
[[noreturn]] void mpi_failed(int code, const char* call, std::source_location where);

inline void check_mpi(int code, const char* call,
                      std::source_location where = std::source_location::current()) {
  if (code != MPI_SUCCESS) [[unlikely]]
    mpi_failed(code, call, where);
}

}  // namespace isobath::comm

/// Every MPI call goes through this.
#define ISOBATH_MPI(call) ::isobath::comm::check_mpi((call), #call)
