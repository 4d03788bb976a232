#pragma once
#include <vector>

#include "solver_units.hpp"

namespace isobath::pipeline {

/// Solves the rows of all modules that a factorized unit serves, their tiles dealt to all ranks, panel of the
/// factor by panel, which are released on the way; codes and objectives end on every rank.
///
/// solved   codes of the rows that the unit serves are written, its objectives added to the records'.
/// Collective over the session's world.
void solve_rows(const Session& session, SolverUnit& unit, const std::vector<SolveTask>& tasks,
                const model::BlockWeights& weights, std::vector<Solved>& solved);

}  // namespace isobath::pipeline
