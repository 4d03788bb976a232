#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <isobath/core/partition.hpp>

namespace isobath::sensitivity {

/// Rows of ΔW = Ŵ − W of one candidate grid: [rows.size(), d_in] f32 on the device of x. Asked for tile by
/// tile.
using PerturbationRows = std::function<at::Tensor(int64_t candidate, Range rows)>;

/// What replacing W by Ŵ of each of K candidates does to the loss of each sequence and to the linear's
/// output.
struct PerturbationScores {
  at::Tensor first_order;  ///< [b, K] f64  s = ⟨G, X ΔWᵀ⟩ = ⟨GᵀX, ΔW⟩, nats: dL/dε at W + ε ΔW
  at::Tensor output_change;    ///< [b, K] f64  estimate of ‖X ΔWᵀ‖²_F
  at::Tensor weighted_change;  ///< [b, K] f64  estimate of tr(ΔW XᵀDX ΔWᵀ) = Σ_i D_i ‖ΔW x_i‖²
  at::Tensor gradient_norm;  ///< [b] f64     ‖GᵀX‖²_F, the sequence's share of the Fisher matrix's trace
};

struct ProbeKey {
  int64_t first_sequence = 0;  ///< global index of row 0
  int64_t sample = 0;
  int64_t n_probes = 8;
  uint64_t seed = 0;
};

/// Scores of K candidates from one backward pass of a linear. Row tiles of fixed height: no weight-sized
/// temporary.
///
/// x [b, T, d_in], gradient [b, T, d_out] in compute dtype; mask [b, T] bool or undefined (true: a real
/// token); token_weights [b, T] f32. Results on the CPU.
///
/// s and the gradient's norm are exact up to rounding: the product GᵀX is rounded to the compute dtype, sums
/// over its entries are f64. The two changes are unbiased estimates from ±1 probes r over the output
/// channels, E_r (rᵀ ΔW x_i)² = ‖ΔW x_i‖², with fresh probes for each sequence.
///
/// Cost     per sequence T·d_in·d_out multiply-adds in compute dtype (one GᵀX for all candidates) and
///          K·(n_probes + 2)·d_in·d_out in f32. X ΔWᵀ instead would cost the first term K times.
/// Memory   b + 2 tiles [512, d_in] f32 and K·n_probes·d_in f32.
/// Source   METHOD §6: predicted loss of candidates x: Σ_k E[s_k] x_k + ½ xᵀ E[s sᵀ] x.
[[nodiscard]] PerturbationScores perturbation_scores(const at::Tensor& x, const at::Tensor& gradient,
                                                     const at::Tensor& mask, const at::Tensor& token_weights,
                                                     int64_t n_candidates, const PerturbationRows& rows_of,
                                                     const ProbeKey& key);

/// Literal reference in f64, without probes: X ΔWᵀ of whole matrices. delta [K, d_out, d_in].
[[nodiscard]] PerturbationScores perturbation_scores_reference(const at::Tensor& x,
                                                               const at::Tensor& gradient,
                                                               const at::Tensor& mask,
                                                               const at::Tensor& token_weights,
                                                               const at::Tensor& delta);

}  // namespace isobath::sensitivity
