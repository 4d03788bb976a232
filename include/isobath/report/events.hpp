#pragma once
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace isobath::report {

/// events.jsonl: one JSON object a line {"time": ISO-8601 UTC, "event": name, …}, appended and flushed at
/// once. Only rank 0 holds an open log; on other ranks `write` does nothing.
class EventLog {
 public:
  EventLog();  ///< closed: writes nothing
  explicit EventLog(const std::filesystem::path& path);
  ~EventLog();
  EventLog(EventLog&&) noexcept;
  EventLog& operator=(EventLog&&) noexcept;
  void write(const std::string& event, const nlohmann::json& fields);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace isobath::report
