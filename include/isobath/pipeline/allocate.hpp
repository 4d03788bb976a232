#pragma once
#include <filesystem>
#include <isobath/comm/communicator.hpp>
#include <isobath/config/run_config.hpp>
#include <string>
#include <vector>

namespace isobath::pipeline {

struct AllocateRequest {
  double mean_bits = 0;  ///< budget in stored bits a quantized weight, scales included; 0: `bytes`
  int64_t bytes = 0;     ///< budget in bytes of all quantized linears, scales included
  std::string method = "quadratic";  ///< one of allocation_methods()
  bool first_order = true;           ///< with labels of the data: E[s] counts; false: only E[s sᵀ]
  std::filesystem::path output;      ///< widths, YAML; empty: bits.yaml in the run directory
};

/// "quadratic", and the scores it is compared with: "diagonal", "weighted", "hawq-v2", "output".
[[nodiscard]] const std::vector<std::string>& allocation_methods();

/// Chooses one width for each fused set (q/k/v, o, gate/up, down of each block) from a finished measure/ with
/// scores
/// (`sensitivity.gram.bits`): that of sensitivity.reuse, or of the run directory. Widths that
/// quantization.overrides give are kept. Writes `output`, `output` with the extension .json instead, and
/// prints what each method would choose and what the predictor says of it.
///
/// Collective over `world`; the work is rank 0's. Reads headers of the model, no weights. Throws
/// AgreedFailure: config when the budget lies outside what the widths allow, when overrides split a fused set
/// or ask for a width that was not scored, when the statistics are of another model, tokens, loss or grid, or
/// hold no scores; data for damaged statistics.
void allocate(const config::RunConfig& config, const AllocateRequest& request,
              const comm::Communicator& world);

}  // namespace isobath::pipeline
