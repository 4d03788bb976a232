#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/comm/tree_sum.hpp>
#include <isobath/pipeline/original.hpp>
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
  /// ½ tr(ΔW H ΔWᵀ) of round-to-nearest on the same grid; with kSampledColumns input channels or more an
  /// estimate from every sixteenth row tile. NaN where no H could be factorized.
  double objective_rounded = 0;
  double objective = 0;  ///< … of the codes that were chosen, exact; NaN as above
  /// Asymmetric objective of the chosen codes minus that of the original weights; only with a correction.
  std::optional<double> objective_asymmetric;
  double shrinkage = 0;        ///< ρ of H (the largest over row groups)
  int64_t n_sweeps = 0;        ///< of refinement: the last one found nothing to gain, or was the last allowed
  double bits_per_weight = 0;  ///< scales and zeros included
  double wall_s = 0;           ///< not written to modules.json: it differs from run to run
};

/// Input channels from which objective_rounded is an estimate: a product with the factor for every row would
/// take as long as the codes.
inline constexpr int64_t kSampledColumns = 4096;

/// A linear to solve, with what its H needs.
struct SolveTask {
  model::Projection projection;
  quant::GridSpec grid;
  at::Tensor token_weights;           ///< [n, T, row_groups] f32 raw D of all sequences, or undefined: D = 1
  sensitivity::RowGroups row_groups;  ///< of token_weights
};

/// Takes a microbatch and its input X [b, T, d_in] behind the quantized prefix.
using VisitInput =
    std::function<void(const data::Microbatch&, const at::Tensor& x, const Original& original)>;
/// Calls its argument for each local microbatch in order.
using ForEachInput = std::function<void(const VisitInput&)>;

struct Solved {
  quant::QuantizedMatrix matrix;  ///< replicated
  ModuleRecord record;            ///< replicated
};

struct SolverUnit;

/// Quantizes the linears of one input set with all ranks at work. An H of up to quant::kWholeColumns channels
/// is summed over the ranks along the fixed tree onto one rank, which factorizes it while others factorize
/// those of the same set. A wider one is summed, factorized and kept in column panels, which belong to the
/// ranks in turn. Then the panels of the factor visit all ranks one after the other, each rank solving its
/// row tiles as far as a panel allows, and the codes return to all.
///
/// Memory   whole: an H's d² f32 and ⌈log₂ shards⌉ partial sums on every rank while it is summed, on its root
/// 8 d² bytes more. In panels: 4 d² bytes over all ranks, and a few panels. Solving: 4 bytes for each of this
/// rank's weights, and a panel. A refinement 1 byte more for each, and a slab of the factor; an asymmetric
/// correction 8 more, C beside H, for qep a second factor, and for gptaq its matrix whole on every rank.
///
/// Network  whole: ⌈log₂ ranks⌉ messages of d² f32 on the critical path; in panels 2 d² bytes of them, and
/// 4 d² bytes to all ranks for the factorization. Either way 2 d² bytes of factor and the codes to all ranks;
/// factors wider than quant::kWholeColumns go to them again for every pass of a refinement and a correction.
/// Collective over the session's world.
class BlockSolver {
 public:
  BlockSolver(const Session& session, const CalibrationSet& calibration);

  /// weights: the original linears, rows of a module are [d_out, d_in] in compute dtype or wider. set_name:
  /// for errors.
  [[nodiscard]] std::vector<Solved> solve(int64_t block, const std::vector<SolveTask>& tasks,
                                          const model::BlockWeights& weights,
                                          const ForEachInput& for_each_input) const;

 private:
  /// Factor of each unit, or `failed`: of one that is spread on all ranks but for its panels, of the others
  /// on the root, from where `share` sends it.
  void factorize(const std::vector<SolverUnit*>& units, int64_t n_channels,
                 const ForEachInput& for_each_input) const;
  void factorize_whole(const std::vector<SolverUnit*>& units, int64_t n_channels,
                       const ForEachInput& for_each_input) const;
  void share(const std::vector<SolverUnit*>& units, int64_t n_channels) const;
  void share(SolverUnit& unit, int64_t n_channels) const;
  void describe(const SolverUnit& unit, int64_t n_channels, std::vector<Solved>& solved) const;

  const Session& session_;
  const CalibrationSet& calibration_;
  quant::FactorSpec factor_spec_;
};

/// Round-to-nearest on the linears of one input set, which needs neither inputs nor other ranks. Local.
[[nodiscard]] std::vector<Solved> round_set(int64_t block, const std::vector<SolveTask>& tasks,
                                            const model::BlockWeights& weights);

}  // namespace isobath::pipeline
