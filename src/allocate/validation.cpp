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

double sample_loss(const at::Tensor& scores, const Selection& selection, double tokens_per_sequence,
                   bool with_linear) {
  const at::Tensor sums = scores.index_select(1, at::tensor(selection, at::kLong)).sum(1);
  const double first = with_linear ? sums.mean().item<double>() : 0;
  return (first + 0.5 * sums.square().mean().item<double>()) / tokens_per_sequence;
}

double held_out_loss(const at::Tensor& scores, const Candidates& candidates, double tokens_per_sequence,
                     bool with_linear, int64_t samples, std::optional<double> shrinkage,
                     const Choose& choose) {
  ISOBATH_CHECK(samples > 0 && scores.size(0) % samples == 0 && scores.size(0) / samples >= kFolds,
                "{} draws of {} samples cannot be dealt to {} folds", scores.size(0), samples, kFolds);
  // All draws of a sequence go together: they share its text.
  const at::Tensor fold = at::arange(scores.size(0)).floor_divide(samples).remainder(kFolds);
  double sum = 0;
  for (int64_t held = 0; held < kFolds; ++held) {
    const at::Tensor is_held = fold == held;
    const at::Tensor train = scores.index({is_held.logical_not()}), test = scores.index({is_held});
    const QuadraticLoss loss = estimate_loss(train, candidates, tokens_per_sequence, with_linear, shrinkage);
    sum += sample_loss(test, choose(loss), tokens_per_sequence, with_linear);
  }
  return sum / static_cast<double>(kFolds);
}

double validated_shrinkage(const at::Tensor& scores, const Candidates& candidates, double tokens_per_sequence,
                           bool with_linear, int64_t samples) {
  const double analytic = estimate_loss(scores, candidates, tokens_per_sequence, with_linear).shrinkage;
  if (scores.size(0) / samples < kFolds) return analytic;
  double best = analytic, least = std::numeric_limits<double>::infinity();
  for (const double step : kSteps) {
    const double shrinkage = analytic + step * (1 - analytic);
    const double held_out =
        held_out_loss(scores, candidates, tokens_per_sequence, with_linear, samples, shrinkage,
                      [&](const QuadraticLoss& loss) {
                        return exchange(loss, candidates, solve_knapsack(candidates, loss.diagonal()));
                      });
    if (held_out >= least) continue;
    least = held_out;
    best = shrinkage;
  }
  return best;
}

}  // namespace isobath::allocate
