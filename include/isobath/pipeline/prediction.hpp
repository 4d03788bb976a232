#pragma once
#include <isobath/pipeline/session.hpp>
#include <isobath/plan/plan.hpp>
#include <isobath/report/events.hpp>
#include <optional>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// Predicted beside measured cost of each stage of a run; silent unless the configuration names a
/// `plan.cluster`.
class Prediction {
 public:
  /// Reads the description on rank 0. Collective over the session's world.
  /// Throws   AgreedFailure (config): no such file, or a bad description.
  explicit Prediction(const Session& session);

  /// Records a stage that just ended: event "cost" with seconds and peak memory of the largest rank and, with
  /// CUDA, of its device's tensors, predicted and measured. `stage`: load, measure, quantize, evaluate.
  /// Collective over the session's world.
  void record(const std::string& stage, double measured_s, report::EventLog& events);

  /// The table for the closing summary; empty when nothing was recorded.
  [[nodiscard]] std::string text() const;

 private:
  struct Row {
    std::string stage;
    double predicted_s, measured_s, predicted_bytes, measured_bytes, predicted_device_bytes,
        measured_device_bytes;
  };
  const Session& session_;
  std::optional<plan::Plan> plan_;
  // Predicted so far: what a process has held once counts for its later stages too.
  double peak_bytes_ = 0, device_peak_bytes_ = 0;
  std::vector<Row> rows_;
};

/// Most memory that this process held so far (getrusage), bytes.
[[nodiscard]] int64_t peak_memory_bytes();

}  // namespace isobath::pipeline
