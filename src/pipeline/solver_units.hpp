#pragma once
#include <isobath/pipeline/block_solver.hpp>
#include <isobath/pipeline/panel_factor.hpp>
#include <vector>

namespace isobath::pipeline {

/// One H and the rows it serves: a row group of one module, or every row of all modules of the set when D
/// = 1.
struct SolverUnit {
  struct Rows {
    size_t task;
    Range rows;  ///< in the order of the task's row groups
  };
  std::vector<Rows> serves;
  at::Tensor token_weights;  // [n, T] f32 robust and normalised to mean 1, then shrunk; undefined: D = 1
  double n_effective = 0;    // of the weights before they were shrunk
  double shrinkage = 0;      // ρ
  int root = 0;              // where H and C end that are not spread; owner of the first panel
  PanelLayout layout;        // of the factor
  at::Tensor h;              // [d, d] f32 on the root unless spread, until it is factorized
  at::Tensor c;              // as h; only with an asymmetric correction
  quant::Factor factor;      // replicated, but for the panels
  // Only with an asymmetric correction: C in panels [d, width] f32, each on its owner; as factor for qep; M
  // of gptaq [d, d] f32, replicated.
  std::vector<at::Tensor> c_panels;
  quant::Factor ridge_factor;
  at::Tensor correction;
  bool is_weighted = false;
  int64_t n_fallbacks = 0;
};

/// The units of the tasks of one input set of a block, dealt to the ranks; H still missing. Local.
[[nodiscard]] std::vector<SolverUnit> make_units(const Session& session, const std::vector<SolveTask>& tasks,
                                                 const model::BlockWeights& weights, int64_t block);

/// Shrinks the token weights of weighted units towards equal ones by sensitivity.shrinkage; nothing when that
/// is 0. One pass over the inputs for the traces of H. Collective over the session's world.
void shrink_weights(const Session& session, const CalibrationSet& calibration, std::vector<SolverUnit>& units,
                    int64_t n_channels, const ForEachInput& for_each_input);

/// H, and C with an asymmetric correction, of units that are not spread, in one pass over the inputs, summed
/// over the ranks along the fixed tree and left on each unit's root. Collective over the session's world.
void accumulate(const Session& session, const CalibrationSet& calibration,
                const std::vector<SolverUnit*>& units, int64_t n_channels,
                const ForEachInput& for_each_input);

/// Sums and factorizes H of a spread unit, summing it again for each step of the damping ladder: H is not
/// kept beside its factor, but for a while with qep, whose factor and C come with it. Collective over the
/// session's world.
void factorize_spread(const Session& session, const CalibrationSet& calibration, SolverUnit& unit,
                      const quant::FactorSpec& spec, const ForEachInput& for_each_input);

}  // namespace isobath::pipeline
