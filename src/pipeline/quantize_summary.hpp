#pragma once
#include <isobath/pipeline/block_solver.hpp>
#include <isobath/pipeline/measure.hpp>
#include <isobath/pipeline/quantize.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// An object of modules.json.
[[nodiscard]] nlohmann::json to_json(const ModuleRecord& record);

/// What a block came to; one object of blocks.json.
struct BlockRecord {
  int64_t block = 0;
  double objective_rounded = 0, objective = 0;  ///< sums over its linears (ModuleRecord)
  std::optional<double> deviation = {};         ///< HiddenStreams::deviation behind it
  std::optional<PassLoss> loss = {};            ///< of the model whose blocks up to this one are quantized
};
[[nodiscard]] BlockRecord block_record(int64_t block, const std::vector<ModuleRecord>& linears);
[[nodiscard]] nlohmann::json to_json(const BlockRecord& record);

/// The grid of a linear that is quantized.
[[nodiscard]] quant::GridSpec grid_of(const Session& session, const config::ModuleChoice& choice);

/// What config.json says of the linears, and their numbers.
struct OutputModules {
  std::map<std::string, quant::GridSpec> grids;  ///< of the quantized linears, by name
  std::vector<std::string> ignored;
  QuantizeResult result;  ///< n_modules, modules_of_width, bits_per_weight
};
[[nodiscard]] OutputModules output_modules(const Session& session);

}  // namespace isobath::pipeline
