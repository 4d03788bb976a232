#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace isobath::allocate {

/// Sets of candidates of which exactly one each is taken: widths of fused sets. Candidate k of set s has the
/// flat index first[s] + k.
struct Candidates {
  std::vector<int64_t>
      first;  ///< [n_sets + 1] ascending from 0; set s holds candidates [first[s], first[s + 1])
  std::vector<int64_t> cost;  ///< [n] stored bits, positive
  int64_t budget = 0;         ///< stored bits, at least the sum of each set's cheapest

  [[nodiscard]] int64_t n_sets() const { return static_cast<int64_t>(first.size()) - 1; }
  [[nodiscard]] int64_t size() const { return static_cast<int64_t>(cost.size()); }
};

/// The flat index of the candidate taken in each set, [n_sets].
using Selection = std::vector<int64_t>;

[[nodiscard]] int64_t cost_of(const Candidates& candidates, const Selection& selection);
/// Σ loss of what is taken.
[[nodiscard]] double sum_of(const Selection& selection, std::span<const double> loss);
/// Each set's cheapest candidate.
[[nodiscard]] Selection cheapest(const Candidates& candidates);

/// Minimises Σ loss of what is taken within the budget: the multiple-choice knapsack problem, by GLPK's
/// branch-and-cut to a relative gap of 1e-6, or to a fixed number of nodes. Deterministic.
/// loss [n], finite. Throws NumericError when GLPK finds nothing though a selection exists.
[[nodiscard]] Selection solve_knapsack(const Candidates& candidates, std::span<const double> loss);

/// The same problem with shares in [0, 1] of candidates: a linear program, solved by GLPK's simplex, which
/// starts from the basis of the call before.
class KnapsackRelaxation {
 public:
  explicit KnapsackRelaxation(const Candidates& candidates);
  ~KnapsackRelaxation();
  KnapsackRelaxation(KnapsackRelaxation&&) noexcept;
  /// Shares [n] that minimise Σ loss · share. Throws NumericError when GLPK fails.
  [[nodiscard]] std::vector<double> minimise(std::span<const double> loss);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Slow reference: tries every selection. Precondition: at most 2^20 of them.
[[nodiscard]] Selection brute_force_knapsack(const Candidates& candidates, std::span<const double> loss);

}  // namespace isobath::allocate
