#pragma once
#include <isobath/core/trace.hpp>
#include <string>
#include <vector>

namespace isobath::report {

/// One rank's spans as the elements of a Chrome trace's `traceEvents`, separated by commas: "X" events with
/// pid = rank, times in microseconds, and the rank's name.
[[nodiscard]] std::string timeline_of_rank(int rank, const std::string& host,
                                           const std::vector<trace::Event>& events);

/// The whole file, from all ranks' parts, as chrome://tracing and ui.perfetto.dev read it.
[[nodiscard]] std::string timeline(const std::vector<std::string>& ranks);

}  // namespace isobath::report
