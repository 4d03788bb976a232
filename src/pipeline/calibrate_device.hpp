#pragma once
#include <c10/core/Device.h>

#include <functional>
#include <isobath/plan/cluster.hpp>

namespace isobath::pipeline {

/// Seconds of an action on the slowest rank, while all ranks run it at once.
using SecondsOf = std::function<double(const std::function<void()>&)>;

/// Measures `compute` and `rows` of a cluster on this rank's CUDA device, in about ten seconds. Collective as
/// seconds_of is.
void calibrate_device(plan::Cluster& cluster, c10::Device device, const SecondsOf& seconds_of);

}  // namespace isobath::pipeline
