#pragma once
#include <cstdint>
#include <isobath/config/run_config.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <isobath/model/model_config.hpp>
#include <string>

namespace isobath::pipeline {

/// Throws ConfigError listing every module that the options do not fit (group that does not divide, row
/// groups). Local.
void require_quantizable(const config::RunConfig& config, const model::ModelConfig& model);

/// With an allocation file: throws ConfigError unless it was made for this model, names only modules that are
/// quantized, and leaves one width to each fused set once `quantization.overrides` are applied. Local.
void require_allocated(const config::RunConfig& config, const model::CheckpointReader& source);

/// "16, 32, 64, channel": the usual group sizes that divide `columns`.
[[nodiscard]] std::string groups_that_divide(int64_t columns);

}  // namespace isobath::pipeline
