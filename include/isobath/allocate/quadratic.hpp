#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/allocate/knapsack.hpp>
#include <map>
#include <vector>

namespace isobath::allocate {

/// What `isobath measure` found of every candidate.
struct Scores {
  at::Tensor values;    ///< [n_draws, n] f64 nats: s, a row a sequence and label draw, sequence by sequence
  int64_t samples = 1;  ///< label draws of a sequence; n_draws is a multiple of it
  double tokens_per_sequence = 1;  ///< mean number of predicted tokens
  /// Labels of the data, whose mean gradient is not zero: the loss has a first-order term.
  bool with_linear = false;
  std::vector<int64_t> block = {};  ///< [n_sets] block of each set; empty: nothing is known of their order
  /// [n_sets] what sets of different blocks have in common, such as their place in the block; no two of a
  /// block are of one kind. Empty: nothing is known.
  std::vector<int64_t> kind = {};
  std::vector<int64_t> bits = {};  ///< [n] width of each candidate; may be empty without kind and prior
  /// [n_sequences, n] f64: another prediction of s², up to a factor; none when undefined.
  at::Tensor prior = {};

  [[nodiscard]] int64_t n_sequences() const { return values.size(0) / samples; }
  /// Those of some sequences. index [n_chosen] int64.
  [[nodiscard]] Scores of_sequences(const at::Tensor& index) const;
  [[nodiscard]] Scores without_prior() const;
};

/// What is believed of the correlation of the scores of two sets d blocks apart, where r was found:
/// (1 − shrinkage)·decayᵈ·r + shrinkage·((1 − common)·m + common·common_decayᵈ), m the mean over blocks of
/// the correlation of such sets at such widths within a block, 0 between blocks and for unknown kinds.
struct Coupling {
  double shrinkage = 1;     ///< ρ in [0, 1]
  double decay = 0;         ///< θ in [0, 1]
  double common = 0;        ///< c in [0, 1]: what all pairs have in common
  double common_decay = 0;  ///< γ in [0, 1]
  double alone = 1;         ///< in [0, 1]: least eigenvalue of the means m
};

/// Predicted loss of a selection x ∈ {0, 1}ⁿ, in nats per token:  linear·x + ½ xᵀ curvature x.
struct QuadraticLoss {
  at::Tensor linear;     ///< [n] f64, E[s]/T shrunk towards 0; zeros when the first-order term is left out
  at::Tensor curvature;  ///< [n, n] f64, E[s sᵀ]/T with its correlations replaced by those of `coupling`;
                         ///< positive semidefinite
  Coupling coupling;
  std::map<int64_t, double> prior_share = {};  ///< width -> share of the prior in its squares, in [0, 1]

  /// The additive prediction of each candidate alone: linear + ½ diagonal.
  [[nodiscard]] std::vector<double> diagonal() const;
  [[nodiscard]] double operator()(const Selection& selection) const;
};

/// Estimates the loss from scores.
///
/// rank E[s sᵀ] ≤ n_draws: single correlations are mostly noise, their means over blocks are not. They are
/// shrunk towards the mean of the same two kinds at the same two widths within a block, and, the more the
/// more blocks lie between two sets, towards a common value that keeps the mean of each distance: ρ and θ
/// minimise the estimated squared error about these means (pairs within a set, which never meet, left out); c
/// and γ fit what ρ and θ took from the means between blocks. The error of a correlation is that of its mean
/// over sequences, as draws of a sequence share its text.
///
/// Each E[s_k²] is shrunk towards κ·prior_k, κ the geometric mean of E[s²]/prior of its width, by the share
/// Σ squared standard errors / Σ squared deviations from it (both relative to κ·prior). With labels of the
/// data each E[s_k] is multiplied by max(0, 1 − its squared standard error / E[s_k]²).
///
/// Source   METHOD §6; ρ and the prior's share: Schäfer & Strimmer (2005), eq. 4 and 7; both tapers are
/// positive semidefinite as Kac–Murdock–Szegő matrices, so that the product with E[s sᵀ] stays so (Schur;
/// Furrer & Bengtsson 2007); first-order term: James–Stein, positive part.
/// Cost     O(n_draws · n²) time, O(n²) memory.
[[nodiscard]] QuadraticLoss estimate_loss(const Scores& scores, const Candidates& candidates);

/// Chooses a selection from an estimated loss.
using Choose = std::function<Selection(const QuadraticLoss&)>;

/// What choosing from data is worth on other data: sequences are dealt to 4 folds by index, `choose` sees the
/// loss estimated from three, and the loss of its selection as estimated from the fourth, without the prior,
/// is averaged over the folds. A selection fitted to the noise of few sequences shows here, and not in its
/// own prediction. Squares of the fourth are as found, so that what they are shrunk to is judged too; its
/// correlations are not, as those of a selection's sum are too noisy to compare selections by. Precondition:
/// at least 4 sequences.
[[nodiscard]] double held_out_loss(const Scores& scores, const Candidates& candidates, const Choose& choose);

/// A lower bound of the loss of every selection within the budget.
///
/// Frank–Wolfe on the convex relaxation (shares in [0, 1]) with the linear program as its oracle; each step's
/// gap gives a bound, whatever the number of steps. As x² = x for 0 and 1, the shrunk part of the diagonal
/// counts as linear, which makes the relaxation tighter. Source: Jaggi (ICML 2013), eq. 2.
struct Relaxation {
  double bound = 0;
  std::vector<double> gradient;  ///< [n] at the best shares: a linear loss whose knapsack is a good start
};
[[nodiscard]] Relaxation relax(const QuadraticLoss& loss, const Candidates& candidates);

/// Improves a selection by the best change of one set, or of two sets at once, until none lowers the loss.
/// Stays within the budget. Deterministic. Cost per move: O(n²).
[[nodiscard]] Selection exchange(const QuadraticLoss& loss, const Candidates& candidates, Selection start);

/// The best of `exchange` from several starts: the knapsack of the diagonal, that of the relaxation's
/// gradient, the cheapest selection, and `starts`.
[[nodiscard]] Selection minimise(const QuadraticLoss& loss, const Candidates& candidates,
                                 const Relaxation& relaxation, const std::vector<Selection>& starts);

/// Slow reference: tries every selection. Precondition: at most 2^20 of them.
[[nodiscard]] Selection brute_force_minimum(const QuadraticLoss& loss, const Candidates& candidates);

}  // namespace isobath::allocate
