#include <isobath/core/stop_signal.hpp>

#include <csignal>

namespace isobath {
namespace {

volatile std::sig_atomic_t stop_flag = 0;

void remember_stop(int) {
  stop_flag = 1;
}

}  // namespace

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = remember_stop;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

bool stop_requested() {
  return stop_flag != 0;
}

}  // namespace isobath
