#pragma once
#include <cstdint>
#include <isobath/config/run_config.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <isobath/model/model_config.hpp>
#include <string>

namespace isobath::pipeline {

/// Throws ConfigError listing everything where the options do not fit the model: a group that does not
/// divide, too many row groups, a pattern that matches nothing, an input set whose linears differ in width or
/// group. Local.
void require_quantizable(const config::RunConfig& config, const model::ModelConfig& model);

/// Throws ConfigError where calibration or evaluation has longer sequences than the model's sliding window,
/// in which all attention is causal attention: what is behind a window is not modelled. Local.
void require_attended(const config::RunConfig& config, const model::ModelConfig& model);

/// With an allocation file: throws ConfigError unless it was made for this model, names only modules that are
/// quantized. Local.
void require_allocated(const config::RunConfig& config, const model::CheckpointReader& source);

/// "16, 32, 64, channel": the usual group sizes that divide `columns`.
[[nodiscard]] std::string groups_that_divide(int64_t columns);

}  // namespace isobath::pipeline
