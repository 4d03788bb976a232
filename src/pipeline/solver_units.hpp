#pragma once
#include <isobath/pipeline/block_solver.hpp>
#include <vector>

namespace isobath::pipeline {

/// One H and the rows it serves: a row group of one module, or every row of all modules of the set when D
/// = 1.
struct SolverUnit {
  struct Rows {
    size_t task;
    Range rows;
  };
  std::vector<Rows> serves;
  at::Tensor token_weights;  // [n, T] f32 robust and normalised to mean 1, then shrunk; undefined: D = 1
  double n_effective = 0;    // of the weights before they were shrunk
  double shrinkage = 0;      // ρ
  int root = 0;              // rank where the sums of H and C end, which factorizes
  at::Tensor h;              // [d, d] f32, replicated with the factor
  at::Tensor c;              // [d, d] f32, as h; only with an asymmetric correction
  quant::Factor factor;      // replicated
  at::Tensor damped_h;       // [d, d] f32, replicated; only when codes are refined
  at::Tensor correction;     // [d, d] f32, replicated; only with an asymmetric correction
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

/// H, and C with an asymmetric correction, of all units in one pass over the inputs, summed over the ranks
/// along the fixed tree. Collective over the session's world.
void accumulate(const Session& session, const CalibrationSet& calibration, std::vector<SolverUnit>& units,
                int64_t n_channels, const ForEachInput& for_each_input);

}  // namespace isobath::pipeline
