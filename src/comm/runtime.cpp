#include <isobath/comm/runtime.hpp>

#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>

#include "communicator_state.hpp"
#include "polling.hpp"
#include "progress.hpp"
#include "watchdog_hooks.hpp"

namespace isobath::comm {
namespace {

void abort_all(int exit_code) {
  MPI_Abort(MPI_COMM_WORLD, exit_code);
  _exit(exit_code);
}

// The launcher notices a rank that leaves without finalizing, and ends the others.
void leave(int exit_code) {
  _exit(exit_code);
}

/// Whether the ranks of a node have as many cores between them. Collective.
bool have_core_each(const Communicator& node) {
  cpu_set_t mine;
  CPU_ZERO(&mine);
  if (sched_getaffinity(0, sizeof mine, &mine) != 0) CPU_ZERO(&mine);
  cpu_set_t all;
  CPU_ZERO(&all);
  for (const std::string& bytes : node.all_gather({reinterpret_cast<const char*>(&mine), sizeof mine})) {
    cpu_set_t theirs;
    std::memcpy(&theirs, bytes.data(), sizeof theirs);
    CPU_OR(&all, &all, &theirs);
  }
  return CPU_COUNT(&all) >= node.size();
}

}  // namespace

struct Runtime::State {
  Communicator world;
  int n_exceptions_before;
};

Runtime::Runtime(int& argc, char**& argv) {
  int initialized = 0;
  ISOBATH_MPI(MPI_Initialized(&initialized));
  ISOBATH_CHECK(!initialized, "MPI is initialized already; one Runtime per process");
  // MPI_THREAD_MULTIPLE for the watchdog, which calls MPI_Abort from its own thread, and for the thread that
  // moves transfers.
  int granted = MPI_THREAD_SINGLE;
  ISOBATH_MPI(MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &granted));
  if (granted < MPI_THREAD_FUNNELED) {
    fail<ConfigError>(
        "this MPI grants thread level {}, at least MPI_THREAD_FUNNELED ({}) is needed: rebuild it with "
        "threads",
        granted, MPI_THREAD_FUNNELED);
  }
  ISOBATH_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
  MPI_Comm handle = MPI_COMM_NULL;
  ISOBATH_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &handle));
  state_ = std::make_unique<State>(
      State{Communicator(std::make_unique<Communicator::State>(handle, kDefaultMessageLimit)),
            std::uncaught_exceptions()});
  set_core_for_each_rank(have_core_each(world().node()));
  set_watchdog_identity(world().rank(), world().host(), granted == MPI_THREAD_MULTIPLE ? abort_all : leave);
  if (granted == MPI_THREAD_MULTIPLE && world().size() > 1) start_progress();
}

Runtime::~Runtime() {
  if (std::uncaught_exceptions() > state_->n_exceptions_before) {
    // Finalizing would wait for ranks that wait for this one; leaving without it lets the launcher end them.
    Watchdog::configure(std::chrono::seconds(0));
    stop_progress();
    return;
  }
  try {
    world().barrier();  // MPI_Finalize waits too, but keeps the core busy and is not watched
  } catch (const std::exception& error) {
    log::error("rank {} ({}) cannot finish: {}", world().rank(), world().host(), describe(error));
    abort(ExitCode::internal);
  }
  Watchdog::configure(std::chrono::seconds(0));
  stop_progress();
  state_.reset();
  MPI_Finalize();
}

const Communicator& Runtime::world() const {
  return state_->world;
}

void Runtime::abort(ExitCode code) const {
  abort_all(static_cast<int>(code));
  std::abort();
}

}  // namespace isobath::comm
