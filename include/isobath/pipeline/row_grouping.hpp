#pragma once
#include <filesystem>
#include <isobath/pipeline/session.hpp>
#include <map>

namespace isobath::pipeline {

/// Groups the output rows of every linear by the tokens that their gradients are large at, for grouping
/// cluster: a backward pass over sensitivity.grouping_sequences sequences, spread over the calibration set,
/// leaves a profile of each row (sensitivity::row_profiles); one replica a block clusters them.
///
/// Returns  this stage's blocks -> row groups, on every replica; the same for any grid.
/// Memory   256 bytes a row and partial sum of this stage's blocks, at most ⌈log₂ sequences⌉ + 1 of them;
/// with
///          streamed weights of one block.
/// Cost     those sequences' share of `measure`, less its other statistics. Collective over the session's
/// world. Throws   NumericError for gradients that are not finite.
[[nodiscard]] std::map<int64_t, BlockRowGroups> measure_row_groups(const Session& session,
                                                                   const CalibrationSet& calibration,
                                                                   const model::WeightStore& weights,
                                                                   report::EventLog& events);

/// Row groups of the D that `statistics` holds of a block: as the configuration gives them, or those that
/// were measured. Local. Throws DataError or IoError; DataError also where they are of another number or
/// linear.
[[nodiscard]] BlockRowGroups row_groups_in(const Session& session, const std::filesystem::path& statistics,
                                           int64_t block);

}  // namespace isobath::pipeline
