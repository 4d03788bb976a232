#pragma once
#include <exception>
#include <isobath/comm/runtime.hpp>
#include <string>

namespace isobath::cli {

/// How an exception that reached the top ends the program (docs/errors.md).
struct Ending {
  bool is_shared;  ///< every rank has it: all finalize and rank 0 speaks; else this rank speaks and ends the
                   ///< job
  ExitCode code;
  std::string message;
};
[[nodiscard]] Ending ending_of(const std::exception& error);

/// The whole program after MPI is up: holds its one `try` and turns kinds of errors into exit codes.
/// Collective over the runtime's world. Returns the exit code; does not return when only this rank failed
/// among several.
[[nodiscard]] int guarded_main(int argc, char** argv, const comm::Runtime& runtime);

}  // namespace isobath::cli
