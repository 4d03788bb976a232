#include "polling.hpp"

#include <sched.h>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <string_view>
#include <thread>

namespace isobath::comm {
namespace {

constexpr int kImmediatePolls = 200;  // about 30 µs: the answer of a rank that runs on a core of its own
constexpr int kYieldingPolls = 100;
constexpr std::chrono::microseconds kLongestSleep{200};

bool has_core_for_each_rank = false;

}  // namespace

void set_core_for_each_rank(bool has_core) {
  has_core_for_each_rank = has_core;
}

void Backoff::pause() {
  if (n_pauses_ < kImmediatePolls) {
    ++n_pauses_;
    return;
  }
  if (has_core_for_each_rank || n_pauses_ < kImmediatePolls + kYieldingPolls) {
    if (!has_core_for_each_rank) ++n_pauses_;
    sched_yield();
    return;
  }
  std::this_thread::sleep_for(sleep_);
  sleep_ = std::min(2 * sleep_, kLongestSleep);
}

void wait_for(MPI_Request request, const char* operation) {
  wait_until(operation, [&] {
    int done = 0;
    ISOBATH_MPI(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
    return done != 0;
  });
}

void mpi_failed(int code, const char* call, std::source_location where) {
  char text[MPI_MAX_ERROR_STRING] = "unknown MPI error";
  int length = 0;
  MPI_Error_string(code, text, &length);
  std::string_view file = where.file_name();
  file.remove_prefix(file.rfind('/') == std::string_view::npos ? 0 : file.rfind('/') + 1);
  fail<InternalError>("{} failed: {} ({}:{}); another rank may have ended, see its message", call, text, file,
                      where.line());
}

}  // namespace isobath::comm
