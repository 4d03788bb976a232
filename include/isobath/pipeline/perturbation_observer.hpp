#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/data/shards.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <isobath/quant/grid.hpp>
#include <vector>

namespace isobath::pipeline {

/// Scores the candidate widths of one linear (`sensitivity.gram.bits`) on this rank's sequences. Every value
/// belongs to one sequence, so no sum over ranks is needed: the rows of all replicas are put side by side.
///
/// Memory   the grids of each width (no codes, no second copy of the weight) and a few f64 a sequence and
/// width.
class PerturbationObserver {
 public:
  /// Grids are fitted to the weight as round_to_nearest fits them, at once: a clip search a width.
  /// sequences: those of this rank's replica.
  PerturbationObserver(const Session& session, const std::string& module, at::Tensor weight, Range sequences);

  /// x [b, T, d_in], gradient [b, T, d_out], mask [b, T] or undefined, token_weights [b, T] f32.
  void observe(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask,
               const at::Tensor& token_weights, Range sequences, int64_t sample);

  /// What was observed so far, of this rank's sequences.
  [[nodiscard]] const Perturbations& value() const { return value_; }

 private:
  struct Grid {
    quant::GridSpec spec;
    at::Tensor scale, zero;  // [d_out, groups]
  };
  [[nodiscard]] at::Tensor change(const Grid& grid, Range rows) const;

  const Session& session_;
  at::Tensor weight_;
  Range sequences_;
  std::vector<Grid> grids_;  // one a width
  Perturbations value_;
};

}  // namespace isobath::pipeline
