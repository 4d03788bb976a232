#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <isobath/allocate/knapsack.hpp>
#include <optional>
#include <vector>

namespace isobath::allocate {

/// Predicted loss of a selection x ∈ {0, 1}ⁿ, in nats per token:  linear·x + ½ xᵀ curvature x.
struct QuadraticLoss {
  at::Tensor linear;     ///< [n] f64, E[s]/T shrunk towards 0; zeros when the first-order term is left out
  at::Tensor curvature;  ///< [n, n] f64, E[s sᵀ]/T with the off-diagonal multiplied by 1 − shrinkage;
                         ///< positive semidefinite
  double shrinkage = 0;  ///< ρ in [0, 1]

  /// The additive prediction of each candidate alone: linear + ½ diagonal.
  [[nodiscard]] std::vector<double> diagonal() const;
  [[nodiscard]] double operator()(const Selection& selection) const;
};

/// Estimates the loss from scores [n_draws, n] f64 (one row a sequence and label draw, nats) and the mean
/// number of predicted tokens of a sequence.
///
/// rank E[s sᵀ] ≤ n_draws, so its off-diagonal is shrunk towards 0 by ρ: `shrinkage`, or else the one that
/// minimises the expected squared error of the correlations (pairs within a set, which never meet, left out).
/// with_linear: labels of
/// the data, whose mean gradient is not zero; each E[s_k] is multiplied by max(0, 1 − its squared standard
/// error / E[s_k]²). Source   METHOD §6; ρ: Schäfer & Strimmer (2005), eq. 4 on standardised scores;
/// James–Stein, positive part.
[[nodiscard]] QuadraticLoss estimate_loss(const at::Tensor& scores, const Candidates& candidates,
                                          double tokens_per_sequence, bool with_linear,
                                          std::optional<double> shrinkage = {});

/// Loss of a selection on some draws as they are, nothing shrunk: E[Σs]/T (with_linear) + ½ E[(Σs)²]/T.
[[nodiscard]] double sample_loss(const at::Tensor& scores, const Selection& selection,
                                 double tokens_per_sequence, bool with_linear);

/// Chooses a selection from an estimated loss.
using Choose = std::function<Selection(const QuadraticLoss&)>;

/// What choosing from data is worth on other data: sequences are dealt to 4 folds by index, `choose` sees the
/// loss estimated from three, and its selection's sample_loss on the fourth is averaged over the folds. A
/// selection fitted to the noise of few sequences shows here, and not in its own prediction. Precondition:
/// n_draws = n_sequences · samples, sequence by sequence, with at least 4 sequences.
[[nodiscard]] double held_out_loss(const at::Tensor& scores, const Candidates& candidates,
                                   double tokens_per_sequence, bool with_linear, int64_t samples,
                                   std::optional<double> shrinkage, const Choose& choose);

/// The ρ of least held-out loss of the exchange from the diagonal's knapsack, among that of estimate_loss and
/// steps from it to 1; that of estimate_loss when there are fewer than 4 sequences.
[[nodiscard]] double validated_shrinkage(const at::Tensor& scores, const Candidates& candidates,
                                         double tokens_per_sequence, bool with_linear, int64_t samples);

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
