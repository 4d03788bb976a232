#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/pipeline/session.hpp>
#include <map>

namespace isobath::pipeline {

/// The original model's last hidden states of this replica's microbatches, by index, on its last stage; empty
/// elsewhere. One forward pass, pipelined, or with streamed weights block after block. Memory: n_local · T ·
/// d_model in compute dtype there. Collective over the session's world. Throws StopRequested.
[[nodiscard]] std::map<int64_t, at::Tensor> forward_original(const Session& session,
                                                             const CalibrationSet& calibration,
                                                             const model::WeightStore& weights);

}  // namespace isobath::pipeline
