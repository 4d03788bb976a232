#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/comm/tree_sum.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/quant/solver.hpp>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// How one linear was quantized; one line of the log and one object of modules.json.
struct ModuleRecord {
  std::string module;
  int bits = 0;
  int64_t group = 0;
  std::string weighting;    ///< what H was in the end: "sensitivity", "none", or "round_to_nearest"
  double damping = 0;       ///< λ that worked (the largest over row groups)
  int64_t n_fallbacks = 0;  ///< damping steps and fallbacks of H
  double effective_samples_per_channel = 0;  ///< n_eff / d_in (the smallest over row groups)
  double objective_rounded = 0;              ///< ½ tr(ΔW H ΔWᵀ) of round-to-nearest on the same grid
  double objective = 0;                      ///< … of the codes that were chosen
  /// Asymmetric objective of the chosen codes minus that of the original weights; only with a correction.
  std::optional<double> objective_asymmetric;
  double shrinkage = 0;        ///< ρ of H (the largest over row groups)
  double bits_per_weight = 0;  ///< scales and zeros included
  double wall_s = 0;           ///< not written to modules.json: it differs from run to run
};

/// A linear to solve, with what its H needs.
struct SolveTask {
  model::Projection projection;
  quant::GridSpec grid;
  at::Tensor token_weights;  ///< [n, T, row_groups] f32 raw D of all sequences, or undefined: D = 1
};

/// Takes a microbatch, its input X [b, T, d_in] behind the quantized prefix, and that of the original model
/// (undefined when it does not travel along).
using VisitInput =
    std::function<void(const data::Microbatch&, const at::Tensor& x, const at::Tensor& original)>;
/// Calls its argument for each local microbatch in order.
using ForEachInput = std::function<void(const VisitInput&)>;

struct Solved {
  quant::QuantizedMatrix matrix;  ///< replicated
  ModuleRecord record;            ///< replicated
};

struct SolverUnit;

/// Quantizes the linears of one input set with all ranks at work: each accumulates H over its own sequences,
/// the partial sums meet along the fixed tree on the rank that factorizes, the factor is broadcast, the row
/// tiles are dealt to the ranks, the codes return to all.
///
/// Memory   per module and row group: two d² f32 (H and its factor) and ⌈log₂ shards⌉ partial sums; the
/// factorizing rank two d² f64 more. Refinement holds d² f32 more, an asymmetric correction twice d² f32.
///
/// Network  per H: ⌈log₂ ranks⌉ messages of d² f32 on the critical path, one broadcast of H and its factor,
/// one exchange of codes. An asymmetric correction doubles that. Collective over the session's world.
class BlockSolver {
 public:
  BlockSolver(const Session& session, const CalibrationSet& calibration);

  /// weights: the original linears, rows of a module are [d_out, d_in] in compute dtype or wider. set_name:
  /// for errors.
  [[nodiscard]] std::vector<Solved> solve(int64_t block, const std::vector<SolveTask>& tasks,
                                          const model::BlockWeights& weights,
                                          const ForEachInput& for_each_input) const;

 private:
  void factorize(std::vector<SolverUnit>& units) const;
  void share(SolverUnit& unit) const;
  void solve_rows(const SolverUnit& unit, const SolveTask& task, const at::Tensor& weight,
                  quant::QuantizedMatrix& matrix, ModuleRecord& record) const;

  const Session& session_;
  const CalibrationSet& calibration_;
  quant::FactorSpec factor_spec_;
  int64_t n_sweeps_;  ///< of refinement, at most
};

/// Round-to-nearest on the linears of one input set, which needs neither inputs nor other ranks. Local.
[[nodiscard]] std::vector<Solved> round_set(int64_t block, const std::vector<SolveTask>& tasks,
                                            const model::BlockWeights& weights);

}  // namespace isobath::pipeline
