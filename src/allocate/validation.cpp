#include <ATen/ATen.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>
#include <limits>

namespace isobath::allocate {
namespace {

constexpr int64_t kFolds = 4;
// Of the distance from the analytic shrinkage to 1.
constexpr double kSteps[] = {0.0, 0.5, 0.75, 0.875, 1.0};

}  // namespace

double sample_loss(const Scores& scores, const Selection& selection) {
  const at::Tensor sums = scores.values.index_select(1, at::tensor(selection, at::kLong)).sum(1);
  const double first = scores.with_linear ? sums.mean().item<double>() : 0;
  return (first + 0.5 * sums.square().mean().item<double>()) / scores.tokens_per_sequence;
}

double held_out_loss(const Scores& scores, const Candidates& candidates, std::optional<double> shrinkage,
                     const Choose& choose) {
  ISOBATH_CHECK(scores.n_sequences() >= kFolds, "{} sequences cannot be dealt to {} folds",
                scores.n_sequences(), kFolds);
  // All draws of a sequence go together: they share its text.
  const at::Tensor fold = at::arange(scores.values.size(0)).floor_divide(scores.samples).remainder(kFolds);
  double sum = 0;
  for (int64_t held = 0; held < kFolds; ++held) {
    const at::Tensor is_held = fold == held;
    const Scores train = scores.with_values(scores.values.index({is_held.logical_not()})),
                 test = scores.with_values(scores.values.index({is_held}));
    sum += sample_loss(test, choose(estimate_loss(train, candidates, shrinkage)));
  }
  return sum / static_cast<double>(kFolds);
}

double validated_shrinkage(const Scores& scores, const Candidates& candidates) {
  const double analytic = estimate_loss(scores, candidates).coupling.shrinkage;
  if (scores.n_sequences() < kFolds) return analytic;
  double best = analytic, least = std::numeric_limits<double>::infinity();
  for (const double step : kSteps) {
    const double shrinkage = analytic + step * (1 - analytic);
    const double held_out = held_out_loss(scores, candidates, shrinkage, [&](const QuadraticLoss& loss) {
      return exchange(loss, candidates, solve_knapsack(candidates, loss.diagonal()));
    });
    if (held_out >= least) continue;
    least = held_out;
    best = shrinkage;
  }
  return best;
}

}  // namespace isobath::allocate
