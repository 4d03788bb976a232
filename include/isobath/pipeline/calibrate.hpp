#pragma once
#include <isobath/comm/communicator.hpp>
#include <string>

namespace isobath::pipeline {

/// Measures what isobath::plan::Cluster describes, by running the library's own kernels on small inputs:
/// every rank of `world` at once, or one while the others wait, as in a run. Returns the YAML of a cluster of
/// these ranks, with their CUDA devices where they have some.
///
/// Files go to the current directory and are removed. Takes under a minute. Collective over `world`.
/// Throws   AgreedFailure (io) when the current directory cannot be written.
[[nodiscard]] std::string calibrate(const comm::Communicator& world);

}  // namespace isobath::pipeline
