#pragma once
#include <cstdint>
#include <isobath/core/timer.hpp>
#include <string>

namespace isobath::report {

/// Progress of a stage: on a terminal one rewritten line (stage, bar, done/total, tokens/s, elapsed, ETA);
/// otherwise one log line per `note` only. Rank 0 shows, others are silent.
class Progress {
 public:
  /// unit: "blocks", "microbatches". tokens_per_unit: 0 hides tokens/s.
  Progress(std::string stage, int64_t n_total, std::string unit, int64_t tokens_per_unit, bool is_shown);
  ~Progress();
  void advance(int64_t n_done = 1);
  /// A permanent line of what just finished ("block 7/30  3 bits …"), with ETA appended when not on a
  /// terminal.
  void note(const std::string& text);
  /// "1 m 20 s".
  [[nodiscard]] static std::string format_duration(double seconds);
  /// The line shown on a terminal.
  [[nodiscard]] std::string line() const;

 private:
  [[nodiscard]] double remaining_s() const;  ///< 0: unknown or nothing left
  void show();
  std::string stage_, unit_;
  int64_t n_total_, n_done_ = 0, tokens_per_unit_;
  bool is_shown_;
  double last_shown_s_ = -1;
  Timer timer_;
};

}  // namespace isobath::report
