#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/pipeline/session.hpp>
#include <map>

namespace isobath::pipeline {

/// The original model's last hidden states of `microbatches` (whole ones of the calibration set, ascending,
/// on every rank the same), by index: this replica's on its last stage, nothing elsewhere. One forward pass,
/// pipelined, or with streamed weights block after block. Memory: n_local · T · d_model in compute dtype
/// there. Collective over the session's world. Throws StopRequested.
[[nodiscard]] std::map<int64_t, at::Tensor> forward_original(
    const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
    const std::vector<data::Microbatch>& microbatches);

}  // namespace isobath::pipeline
