#pragma once
#include <isobath/plan/memory.hpp>

namespace isobath::plan {

/// Adds what solving holds, the most of all input sets and phases: H and its partial sums; its factor in the
/// making; what of it serves the rows, and this rank's rows in work, which stand where the column loop runs.
void add_solver(const Job& job, RankMemory& memory);

/// Weights of the largest linear.
[[nodiscard]] double largest_module(const Job& job);

/// A module's values made from its codes: in the storage dtype, and in the compute dtype when that is
/// another.
[[nodiscard]] double dequantize_bytes(const Job& job);

/// Partial sums of a tree over n local shards: at most one a level.
[[nodiscard]] double tree_levels(int64_t n_shards);

}  // namespace isobath::plan
