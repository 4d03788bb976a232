#include <isobath/report/progress.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>

namespace isobath::report {
namespace {

constexpr double kRefresh_s = 0.1;
constexpr int64_t kBarWidth = 24;

}  // namespace

Progress::Progress(std::string stage, int64_t n_total, std::string unit, int64_t tokens_per_unit,
                   bool is_shown)
    : stage_(std::move(stage)),
      unit_(std::move(unit)),
      n_total_(n_total),
      tokens_per_unit_(tokens_per_unit),
      is_shown_(is_shown) {
  ISOBATH_CHECK(n_total >= 0 && tokens_per_unit >= 0, "progress of {} {}, {} tokens each", n_total, unit_,
                tokens_per_unit);
}

Progress::~Progress() {
  if (is_shown_ && log::is_terminal()) log::end_status_line();
}

void Progress::advance(int64_t n_done) {
  n_done_ += n_done;
  const double now_s = timer_.seconds();
  if (n_done_ < n_total_ && last_shown_s_ >= 0 && now_s - last_shown_s_ < kRefresh_s) return;
  last_shown_s_ = now_s;
  show();
}

void Progress::note(const std::string& text) {
  if (!is_shown_) return;
  if (log::is_terminal()) {
    log::info("{}", text);
    show();
    return;
  }
  const double left_s = remaining_s();
  log::info("{}{}", text, left_s > 0 ? "  ETA " + format_duration(left_s) : "");
}

double Progress::remaining_s() const {
  if (n_done_ <= 0 || n_done_ >= n_total_) return 0;
  return timer_.seconds() * static_cast<double>(n_total_ - n_done_) / static_cast<double>(n_done_);
}

std::string Progress::line() const {
  const int64_t done = std::clamp<int64_t>(n_done_, 0, n_total_);
  const int64_t filled = n_total_ == 0 ? kBarWidth : kBarWidth * done / n_total_;
  std::string bar;
  for (int64_t i = 0; i < kBarWidth; ++i) bar += i < filled ? "█" : "░";
  const double elapsed_s = timer_.seconds();
  std::string line = fmt::format("{} {} {}/{} {}", stage_, bar, n_done_, n_total_, unit_);
  if (tokens_per_unit_ > 0 && n_done_ > 0 && elapsed_s > 0)
    line += fmt::format("  {:.0f} tokens/s", static_cast<double>(n_done_ * tokens_per_unit_) / elapsed_s);
  line += "  " + format_duration(elapsed_s);
  if (const double left_s = remaining_s(); left_s > 0) line += "  ETA " + format_duration(left_s);
  return line;
}

void Progress::show() {
  if (is_shown_ && log::is_terminal()) log::status_line(line());
}

std::string Progress::format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "unknown";
  if (seconds < 9.95) return fmt::format("{:.1f} s", seconds);
  constexpr double kLongest_s = 1e12;
  const auto whole = static_cast<int64_t>(std::llround(std::min(seconds, kLongest_s)));
  const int64_t s = whole % 60, m = whole / 60 % 60, h = whole / 3600 % 24, d = whole / 86400;
  if (d > 0) return fmt::format("{} d {} h", d, h);
  if (h > 0) return fmt::format("{} h {} m", h, m);
  if (m > 0) return fmt::format("{} m {} s", m, s);
  return fmt::format("{} s", s);
}

}  // namespace isobath::report
