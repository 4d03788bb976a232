#include <chrono>
#include <isobath/core/trace.hpp>
#include <optional>

namespace isobath::trace {
namespace {

struct Recording {
  std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
  std::vector<Event> events;

  [[nodiscard]] double now_us() const {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }
};

std::optional<Recording>& recording() {
  static std::optional<Recording> the_recording;
  return the_recording;
}

}  // namespace

void start() {
  recording().emplace();
}

bool is_on() {
  return recording().has_value();
}

std::vector<Event> stop() {
  std::vector<Event> events;
  if (recording()) events = std::move(recording()->events);
  recording().reset();
  return events;
}

Span::Span(const char* name, int64_t number)
    : name_(name), number_(number), begin_us_(is_on() ? recording()->now_us() : -1) {}

Span::~Span() {
  if (begin_us_ < 0 || !is_on()) return;
  recording()->events.push_back({name_, number_, begin_us_, recording()->now_us() - begin_us_});
}

}  // namespace isobath::trace
