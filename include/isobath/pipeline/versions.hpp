#pragma once
#include <filesystem>
#include <isobath/pipeline/session.hpp>
#include <memory>
#include <vector>

namespace isobath::pipeline {

/// This rank's weights of another version of the session's model, plain or quantized (compressed-tensors), as
/// the configuration's residency has them. Collective over the session's world. Throws AgreedFailure: data.
[[nodiscard]] model::WeightStore open_version(const Session& session,
                                              const std::filesystem::path& checkpoint);

/// The checkpoints of sensitivity.gram.checkpoints, opened, one a width of sensitivity.gram.bits; empty when
/// the widths are rounded. Reads headers only. Collective over the session's world. Throws AgreedFailure:
/// data when one is no version of the model, says that it was made from another, or quantizes a linear on
/// another grid than the configuration has for that width.
[[nodiscard]] std::vector<std::shared_ptr<const model::CheckpointReader>> open_perturbed_versions(
    const Session& session);

}  // namespace isobath::pipeline
