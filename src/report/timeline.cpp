#include <isobath/report/timeline.hpp>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

namespace isobath::report {

std::string timeline_of_rank(int rank, const std::string& host, const std::vector<trace::Event>& events) {
  std::vector<std::string> parts;
  const nlohmann::json name = {{"name", "process_name"},
                               {"ph", "M"},
                               {"pid", rank},
                               {"args", {{"name", fmt::format("rank {} ({})", rank, host)}}}};
  parts.push_back(name.dump());
  for (const trace::Event& event : events) {
    nlohmann::json span = {{"name", event.name},   {"ph", "X"},
                           {"pid", rank},          {"tid", 0},
                           {"ts", event.begin_us}, {"dur", event.duration_us}};
    if (event.number >= 0) span["args"] = {{"number", event.number}};
    parts.push_back(span.dump());
  }
  return fmt::format("{}", fmt::join(parts, ",\n"));
}

std::string timeline(const std::vector<std::string>& ranks) {
  return fmt::format("{{\"displayTimeUnit\": \"ms\", \"traceEvents\": [\n{}\n]}}\n", fmt::join(ranks, ",\n"));
}

}  // namespace isobath::report
