#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/allocate/knapsack.hpp>
#include <optional>
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

  [[nodiscard]] int64_t n_sequences() const { return values.size(0) / samples; }
  [[nodiscard]] Scores with_values(at::Tensor rows) const;
};

/// What is believed of the correlation of the scores of two sets d blocks apart, where r was found:
/// (1 − shrinkage)·decayᵈ·r + shrinkage·common·common_decayᵈ.
struct Coupling {
  double shrinkage = 1;     ///< ρ in [0, 1]
  double decay = 0;         ///< θ in [0, 1]
  double common = 0;        ///< c in [0, 1]: what pairs of one block have in common
  double common_decay = 0;  ///< in [0, 1]
};

/// Predicted loss of a selection x ∈ {0, 1}ⁿ, in nats per token:  linear·x + ½ xᵀ curvature x.
struct QuadraticLoss {
  at::Tensor linear;     ///< [n] f64, E[s]/T shrunk towards 0; zeros when the first-order term is left out
  at::Tensor curvature;  ///< [n, n] f64, E[s sᵀ]/T with its correlations replaced by those of `coupling`;
                         ///< positive semidefinite
  Coupling coupling;

  /// The additive prediction of each candidate alone: linear + ½ diagonal.
  [[nodiscard]] std::vector<double> diagonal() const;
  [[nodiscard]] double operator()(const Selection& selection) const;
};

/// Estimates the loss from scores.
///
/// rank E[s sᵀ] ≤ n_draws: single correlations are mostly noise, their mean over all pairs d blocks apart is
/// not. They are shrunk, the more the more blocks lie between two sets, towards a common value that keeps the
/// mean of each distance: θ, and ρ unless `shrinkage` gives it, minimise the estimated squared error about
/// these means (pairs within a set, which never meet, left out); c and its decay fit what ρ and θ took from
/// the means. The error of a correlation is that of its mean over sequences, as draws of a sequence share its
/// text. With labels of the data each E[s_k] is multiplied by max(0, 1 − its squared standard error /
/// E[s_k]²).
///
/// Source   METHOD §6; ρ: Schäfer & Strimmer (2005), eq. 4 and target F on standardised scores; both tapers
/// are positive semidefinite as Kac–Murdock–Szegő matrices, so that the product with E[s sᵀ] stays so (Schur;
/// Furrer & Bengtsson 2007); first-order term: James–Stein, positive part.
/// Cost     O(n_draws · n²) time, O(n²) memory.
[[nodiscard]] QuadraticLoss estimate_loss(const Scores& scores, const Candidates& candidates,
                                          std::optional<double> shrinkage = {});

/// Loss of a selection on some draws as they are, nothing shrunk: E[Σs]/T (with_linear) + ½ E[(Σs)²]/T.
[[nodiscard]] double sample_loss(const Scores& scores, const Selection& selection);

/// Chooses a selection from an estimated loss.
using Choose = std::function<Selection(const QuadraticLoss&)>;

/// What choosing from data is worth on other data: sequences are dealt to 4 folds by index, `choose` sees the
/// loss estimated from three, and its selection's sample_loss on the fourth is averaged over the folds. A
/// selection fitted to the noise of few sequences shows here, and not in its own prediction. Precondition:
/// at least 4 sequences.
[[nodiscard]] double held_out_loss(const Scores& scores, const Candidates& candidates,
                                   std::optional<double> shrinkage, const Choose& choose);

/// The ρ of least held-out loss of the exchange from the diagonal's knapsack, among that of estimate_loss and
/// steps from it to 1; that of estimate_loss when there are fewer than 4 sequences.
[[nodiscard]] double validated_shrinkage(const Scores& scores, const Candidates& candidates);

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
