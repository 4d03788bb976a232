#include <isobath/comm/runtime.hpp>

#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <isobath/comm/cores.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>

#include "communicator_state.hpp"
#include "inquiry.hpp"
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
  const Communicator node = world().node();
  set_core_for_each_rank(cores_of(node).usable >= node.size());
  set_watchdog_identity(world().rank(), world().host(), granted == MPI_THREAD_MULTIPLE ? abort_all : leave);
  if (granted == MPI_THREAD_MULTIPLE && world().size() > 1) {
    start_progress();
    MPI_Comm own = MPI_COMM_NULL;
    ISOBATH_MPI(MPI_Comm_dup(MPI_COMM_WORLD, &own));
    set_watchdog_inquiry(std::make_unique<Inquiry>(own, world().all_gather(world().host())));
  }
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
  set_watchdog_inquiry(nullptr);
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
