#pragma once
#include <fmt/format.h>

#include <string>
#include <string_view>
#include <utility>

/// The one place of the program that prints. Rank 0 logs to stderr from `info` up, other ranks only warnings
/// and errors, each line then prefixed with `[rank r]`. Results for the user (tables) go to stdout through
/// `print`.
namespace isobath::log {

enum class Level { debug, info, warning, error };

/// Sets who is speaking. Called once by the command line after the ranks are known.
void configure(int rank, int n_ranks, Level level);

void write(Level level, std::string_view message);
/// Writes to stdout, on rank 0 only, and flushes.
void print(std::string_view text);
/// Rewrites the current line of stderr (progress on a terminal); rank 0 only.
void status_line(std::string_view text);
/// Ends a status line, if one stands, so that the next line starts at the margin.
void end_status_line();
/// Whether stderr is a terminal.
[[nodiscard]] bool is_terminal();

template <class... A>
void debug(fmt::format_string<A...> f, A&&... a) {
  write(Level::debug, fmt::format(f, std::forward<A>(a)...));
}
template <class... A>
void info(fmt::format_string<A...> f, A&&... a) {
  write(Level::info, fmt::format(f, std::forward<A>(a)...));
}
template <class... A>
void warning(fmt::format_string<A...> f, A&&... a) {
  write(Level::warning, fmt::format(f, std::forward<A>(a)...));
}
template <class... A>
void error(fmt::format_string<A...> f, A&&... a) {
  write(Level::error, fmt::format(f, std::forward<A>(a)...));
}

}  // namespace isobath::log
