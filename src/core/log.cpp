#include <isobath/core/log.hpp>

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cstdio>

namespace isobath::log {
namespace {

struct Printer {
  int rank = 0;
  bool status_stands = false;
  std::shared_ptr<spdlog::logger> logger = [] {
    auto made =
        std::make_shared<spdlog::logger>("isobath", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_pattern("%H:%M:%S %v");
    made->flush_on(spdlog::level::trace);
    return made;
  }();
};

// The only mutable global of the program: one process has one stderr.
Printer& printer() {
  static Printer instance;
  return instance;
}

spdlog::level::level_enum to_spdlog(Level level) {
  switch (level) {
    case Level::debug:
      return spdlog::level::debug;
    case Level::info:
      return spdlog::level::info;
    case Level::warning:
      return spdlog::level::warn;
    case Level::error:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void configure(int rank, int n_ranks, Level level) {
  printer().rank = rank;
  printer().logger->set_level(rank == 0 ? to_spdlog(level) : spdlog::level::warn);
  if (n_ranks > 1 && rank != 0) printer().logger->set_pattern(fmt::format("%H:%M:%S [rank {}] %v", rank));
}

void write(Level level, std::string_view message) {
  end_status_line();
  const char* mark = level == Level::error ? "error: " : level == Level::warning ? "warning: " : "";
  printer().logger->log(to_spdlog(level), "{}{}", mark, message);
}

void print(std::string_view text) {
  if (printer().rank != 0) return;
  end_status_line();
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void status_line(std::string_view text) {
  if (printer().rank != 0) return;
  fmt::print(stderr, "\r\x1b[K{}", text);
  std::fflush(stderr);
  printer().status_stands = true;
}

void end_status_line() {
  if (!printer().status_stands) return;
  std::fputs("\r\x1b[K", stderr);
  printer().status_stands = false;
}

bool is_terminal() {
  return isatty(STDERR_FILENO) != 0;
}

}  // namespace isobath::log
