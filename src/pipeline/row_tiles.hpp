#pragma once
#include <memory>
#include <vector>

#include "solver_units.hpp"

namespace isobath::pipeline {

/// The rows of all modules that some units of an input set serve, their tiles dealt to all ranks. Two kinds
/// of work: a tile's codes, and the objective of its rounding to nearest, which needs the weights first and
/// the factor only then. Codes are dealt in contiguous shares; roundings go to the ranks that have least to
/// do, the factorization of the units that they are root of counted. Nothing that is computed depends on who
/// does it.
class SetRows {
 public:
  /// Deals the tiles. units: solved together, with equal columns of their panels; they and the weights must
  /// outlive this. Local.
  SetRows(const Session& session, const std::vector<SolverUnit*>& units, const std::vector<SolveTask>& tasks,
          const model::BlockWeights& weights, const std::vector<Solved>& solved);
  ~SetRows();

  /// Rounds this rank's share of tiles to nearest: what ranks do while a root factorizes. Local.
  void round();

  /// Solves panel of the factors by panel, which are released on the way; codes and objectives end on every
  /// rank.
  ///
  /// solved   the codes of the rows that the units serve are written in place of those the constructor got,
  /// in the order of the row groups; objectives are added to the records'. Collective over the session's
  /// world.
  void solve(std::vector<Solved>& solved);

 private:
  class RowTiles;
  /// Whether every rank holds all panels of a factor.
  [[nodiscard]] bool is_everywhere() const;
  /// A panel of one of the unit's factors. Collective over the session's world, as are those below.
  [[nodiscard]] at::Tensor panel_of(const quant::Factor& factor, const SolverUnit& unit, size_t panel) const;
  /// Targets of one unit's modules, from C and for qep the ridge factor.
  void correct(size_t unit);
  /// Sweeps over the codes of one unit's modules.
  void refine(size_t unit);
  const Session& session_;
  std::vector<SolverUnit*> units_;
  std::vector<std::vector<RowTiles>> modules_;  ///< of each unit
};

}  // namespace isobath::pipeline
