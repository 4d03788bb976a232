#pragma once
#include <filesystem>
#include <isobath/checkpoint/run_directory.hpp>
#include <isobath/pipeline/block_solver.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/report/events.hpp>
#include <map>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// A decision of `quantization.reestimate`.
struct ReestimationRecord {
  int64_t block = 0;
  double cosine = 0;  ///< policy drift: of D in use with D of now, mean over the modules from `block` on
  bool refreshed = false;
  double wall_s = 0;
};

struct QuantizeResult {
  double bits_per_weight = 0;  ///< over the quantized linears, scales and zeros included
  int64_t n_modules = 0;
  std::map<int, int64_t> modules_of_width;  ///< bits -> linears
  int64_t n_fallbacks = 0;
  std::vector<ReestimationRecord> reestimations;  ///< also those before a resume
  double wall_s = 0;
};

/// Directory in that of a run which `quantize` writes: "model", or what is tuned before it becomes that.
[[nodiscard]] const char* quantized_name(const config::RunConfig& config);

/// The sequential pass: block by block, input set by input set, with the hidden states of the quantized
/// prefix.
///
///   statistics   directory of D of the unquantized model; not read when weighting is none
///   resume       continue from the newest generation in `run`/checkpoint, if there is one
///
/// Memory   this rank's share of the hidden states: n_local · T · (d_model + d_ff) in compute dtype (twice
/// with an asymmetric correction), the block in work. Network  per block: its weights once to every rank,
/// then what BlockSolver says of each input set. Collective over the session's world. Leaves
/// `run`/quantized_name(). Throws StopRequested after SIGUSR1/SIGTERM, once a generation holds what is done.
QuantizeResult quantize(const Session& session, const CalibrationSet& calibration,
                        const model::WeightStore& weights, const std::filesystem::path& statistics,
                        checkpoint::RunDirectory& run, const checkpoint::Fingerprint& fingerprint,
                        bool resume, report::EventLog& events);

}  // namespace isobath::pipeline
