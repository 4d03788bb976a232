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
/// Memory   the grids of each width (no codes, no second copy of the weight), or a version of the weight a
/// width, and a few f64 a sequence and width.
class PerturbationObserver {
 public:
  /// versions: what each width makes of the weight, [d_out, d_in]; empty: grids are fitted to the weight as
  /// round_to_nearest fits them, at once: a clip search a width. sequences: those of this rank's replica.
  PerturbationObserver(const Session& session, const std::string& module, at::Tensor weight,
                       std::vector<at::Tensor> versions, Range sequences);

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
  void fit_grids();
  /// ΔW of a candidate, f32.
  [[nodiscard]] at::Tensor change(int64_t candidate, Range rows) const;

  const Session& session_;
  at::Tensor weight_;
  Range sequences_;
  std::vector<Grid> grids_;           // one a width, without versions
  std::vector<at::Tensor> versions_;  // one a width, or none
  Perturbations value_;
};

}  // namespace isobath::pipeline
