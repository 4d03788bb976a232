#pragma once
#include <fmt/format.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace isobath {

/// How the process ends; the table of docs/errors.md.
enum class ExitCode : int {
  ok = 0,
  config = 2,      ///< usage or configuration
  data = 3,        ///< bad input: checkpoint, tokens
  io = 4,          ///< disk full, permission, read or write error
  numeric = 5,     ///< non-finite values, a factorization that no fallback saved
  checkpoint = 6,  ///< invalid generation, or a resume that does not match
  internal = 7,    ///< our bug, or another rank failed
  stopped = 75,    ///< stopped on request (SIGUSR1, SIGTERM); `--resume` continues (EX_TEMPFAIL)
};

/// Base of every error the project raises on purpose: a message for the user and the exit code it ends with.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  [[nodiscard]] ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

template <ExitCode kCode>
struct ErrorOf : Error {
  explicit ErrorOf(const std::string& message) : Error(kCode, message) {}
};
using ConfigError = ErrorOf<ExitCode::config>;
using DataError = ErrorOf<ExitCode::data>;
using IoError = ErrorOf<ExitCode::io>;
using NumericError = ErrorOf<ExitCode::numeric>;
using CheckpointError = ErrorOf<ExitCode::checkpoint>;
using InternalError = ErrorOf<ExitCode::internal>;
using StopRequested = ErrorOf<ExitCode::stopped>;

/// The same failure on every rank of a communicator, raised by `Communicator::agree`: all ranks unwind and
/// finalize normally, and only rank 0 prints. Its message already lists the ranks that failed.
class AgreedFailure : public Error {
 public:
  using Error::Error;
};

/// Throws E with a formatted message: what was expected, what was found, where, what to do.
template <class E, class... Arguments>
[[noreturn]] void fail(fmt::format_string<Arguments...> format, Arguments&&... arguments) {
  throw E(fmt::format(format, std::forward<Arguments>(arguments)...));
}

/// Raises InternalError with the expression and its place; the body of ISOBATH_CHECK.
[[noreturn]] void contract_violated(std::string_view expression, const std::string& message,
                                    std::source_location where = std::source_location::current());

/// The messages of an exception and of all it is nested in, outermost context first, joined by " -> ".
[[nodiscard]] std::string describe(const std::exception& error);

/// Exit code of the innermost Error of a nested exception; ExitCode::internal when there is none.
[[nodiscard]] ExitCode exit_code_of(const std::exception& error);

}  // namespace isobath

/// Verifies a precondition of the header's contract; throws InternalError. Never for user input: use fail<…>.
#define ISOBATH_CHECK(condition, ...)                                                     \
  do {                                                                                    \
    if (!(condition)) ::isobath::contract_violated(#condition, fmt::format(__VA_ARGS__)); \
  } while (false)
