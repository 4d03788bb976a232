#pragma once
#include <cstdint>
#include <filesystem>
#include <isobath/comm/communicator.hpp>
#include <isobath/config/run_config.hpp>
#include <string>

namespace isobath::pipeline {

struct DiagnoseRequest {
  std::filesystem::path checkpoint;  ///< quantized model; empty: model/ of the run directory
  std::string tokens;                ///< token file of the probe set; empty: calibration.tokens
  int64_t sequences = 4;             ///< of the probe set, from the start of the file
  int64_t samples = 16;              ///< label draws a token
  int64_t modules = 0;               ///< linears measured, spread evenly over the model; 0: all
  bool only_blocks = false;          ///< measures whole blocks, no single linears
  int64_t rows = 20;                 ///< of the table
  std::filesystem::path output;      ///< JSON; empty: diagnose.json in the run directory
};

/// What quantizing each linear, and each block, alone does to the model, beside what the sensitivities
/// predict (METHOD §7): KL to the original and change of the loss on a probe set with only its weights
/// replaced; curvature ratio, effective samples, cross-token mass, coupling with the others; rank correlation
/// of prediction and measurement, and the linears at risk with the reasons. Prints the table, writes the
/// JSON.
///
/// Computes in f32: a tenth of a rounding step is below a bf16 weight's precision.
///
/// Every rank holds both models; the probe's sequences are dealt to the ranks. The numbers are the same for
/// any number of ranks.
/// Cost     a sequence: one forward pass, 1 + samples backward passes with one product of a weight gradient's
///          size a linear, and for every linear or block measured two forward passes from its block on and
///          three output projections.
/// Memory   both models in f32, a block input of each block of one sequence.
/// Collective over `world`. Throws AgreedFailure: config when there is no finished quantized model; data.
void diagnose(const config::RunConfig& config, const DiagnoseRequest& request,
              const comm::Communicator& world);

}  // namespace isobath::pipeline
