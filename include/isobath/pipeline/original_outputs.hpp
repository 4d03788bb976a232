#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/pipeline/session.hpp>
#include <map>

namespace isobath::pipeline {

/// The original model's last hidden states of this replica's microbatches, by index, on its last stage; empty
/// elsewhere. One pipelined forward pass. Memory: n_local · T · d_model in compute dtype there.
/// Collective over the session's world. Throws StopRequested.
[[nodiscard]] std::map<int64_t, at::Tensor> forward_original(const Session& session,
                                                             const CalibrationSet& calibration,
                                                             const StageWeights& weights);

}  // namespace isobath::pipeline
