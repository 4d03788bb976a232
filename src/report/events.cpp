#include <isobath/report/events.hpp>

#include <fcntl.h>
#include <fmt/chrono.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <isobath/core/error.hpp>
#include <nlohmann/json.hpp>

namespace isobath::report {
namespace {

std::string now_utc() {
  const auto now = std::chrono::floor<std::chrono::milliseconds>(std::chrono::system_clock::now());
  const auto seconds = std::chrono::floor<std::chrono::seconds>(now);
  return fmt::format("{:%Y-%m-%dT%H:%M:%S}.{:03}Z",
                     fmt::gmtime(std::chrono::system_clock::to_time_t(seconds)), (now - seconds).count());
}

}  // namespace

struct EventLog::State {
  std::filesystem::path path;
  int file = -1;
  ~State() {
    if (file >= 0) ::close(file);
  }

  void append(const std::string& text) const {
    for (size_t written = 0; written < text.size();) {
      const ssize_t n = ::write(file, text.data() + written, text.size() - written);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail<IoError>("cannot append to {}: {}", path.string(), std::strerror(errno));
      written += static_cast<size_t>(n);
    }
  }
};

EventLog::EventLog() = default;
EventLog::~EventLog() = default;
EventLog::EventLog(EventLog&&) noexcept = default;
EventLog& EventLog::operator=(EventLog&&) noexcept = default;

EventLog::EventLog(const std::filesystem::path& path) : state_(std::make_unique<State>()) {
  state_->path = path;
  state_->file = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (state_->file < 0)
    fail<IoError>("cannot open {} for appending: {}", path.string(), std::strerror(errno));
  // A run that was killed may have left half a line: later lines must still be whole JSON.
  const off_t size = ::lseek(state_->file, 0, SEEK_END);
  char last = '\n';
  if (size > 0 && ::pread(state_->file, &last, 1, size - 1) == 1 && last != '\n') state_->append("\n");
}

void EventLog::write(const std::string& event, const nlohmann::json& fields) {
  if (!state_) return;
  ISOBATH_CHECK(fields.is_object() || fields.is_null(), "fields of event {} are no JSON object", event);
  nlohmann::ordered_json line = {{"time", now_utc()}, {"event", event}};
  for (const auto& [name, value] : fields.items()) line[name] = value;
  // One write of a whole line: it reaches the file at once, and stays one line beside other writers.
  state_->append(line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

}  // namespace isobath::report
