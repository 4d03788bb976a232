#include <ATen/ATen.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>
#include <limits>

#include "every_selection.hpp"

namespace isobath::allocate {
namespace {

// Frank–Wolfe's gap falls as 1/steps: more steps than this buy digits that no prediction has.
constexpr int kSteps = 400;
constexpr double kRelativeGap = 1e-4;

std::span<const double> values_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr<double>(), static_cast<size_t>(tensor.numel())};
}

/// True where both candidates belong to one set. [n, n] bool.
at::Tensor same_set(const Candidates& candidates) {
  at::Tensor set_of = at::empty({candidates.size()}, at::kLong);
  for (int64_t set = 0; set < candidates.n_sets(); ++set)
    set_of
        .slice(0, candidates.first[static_cast<size_t>(set)], candidates.first[static_cast<size_t>(set) + 1])
        .fill_(set);
  return set_of.unsqueeze(0) == set_of.unsqueeze(1);
}

double optimal_shrinkage(const at::Tensor& scores, const Candidates& candidates) {
  const auto n_draws = static_cast<double>(scores.size(0));
  if (scores.size(0) < 2) return 1;
  const at::Tensor scale = scores.square().mean(0).sqrt();
  const at::Tensor z = scores / scale.masked_fill(scale == 0, 1);
  const at::Tensor correlation = z.t().mm(z) / n_draws;
  const at::Tensor squares = z.square();
  const at::Tensor variance = (squares.t().mm(squares) / n_draws - correlation.square()) / (n_draws - 1);
  const at::Tensor others = same_set(candidates).logical_not();
  const double noise = variance.masked_select(others).sum().item<double>();
  const double signal = correlation.square().masked_select(others).sum().item<double>();
  return signal > 0 ? std::clamp(noise / signal, 0.0, 1.0) : 1.0;
}

}  // namespace

std::vector<double> QuadraticLoss::diagonal() const {
  const at::Tensor alone = (linear + 0.5 * curvature.diagonal()).contiguous();
  return {values_of(alone).begin(), values_of(alone).end()};
}

double QuadraticLoss::operator()(const Selection& selection) const {
  const auto l = linear.accessor<double, 1>();
  const auto c = curvature.accessor<double, 2>();
  double first = 0, second = 0;
  for (const int64_t i : selection) {
    first += l[i];
    for (const int64_t j : selection) second += c[i][j];
  }
  return first + 0.5 * second;
}

QuadraticLoss estimate_loss(const at::Tensor& scores, const Candidates& candidates,
                            double tokens_per_sequence, bool with_linear, std::optional<double> shrinkage) {
  ISOBATH_CHECK(scores.dim() == 2 && scores.scalar_type() == at::kDouble && scores.size(0) > 0 &&
                    scores.size(1) == candidates.size(),
                "scores [n_draws, {}] f64 expected", candidates.size());
  ISOBATH_CHECK(tokens_per_sequence > 0, "{} tokens per sequence", tokens_per_sequence);
  const auto n_draws = static_cast<double>(scores.size(0));
  QuadraticLoss loss;
  loss.shrinkage = shrinkage ? *shrinkage : optimal_shrinkage(scores, candidates);
  const at::Tensor moments = scores.t().mm(scores) / (n_draws * tokens_per_sequence);
  loss.curvature = moments * (1 - loss.shrinkage);
  loss.curvature.diagonal().copy_(moments.diagonal());
  loss.linear = at::zeros({candidates.size()}, at::kDouble);
  if (with_linear && scores.size(0) > 1) {
    const at::Tensor mean = scores.mean(0), square = mean.square();
    const at::Tensor error = (scores.square().mean(0) - square) / (n_draws - 1);
    const at::Tensor kept = (1 - error / square.masked_fill(square == 0, 1)).clamp_min(0);
    loss.linear = mean * kept / tokens_per_sequence;
  }
  return loss;
}

Relaxation relax(const QuadraticLoss& loss, const Candidates& candidates) {
  // ρ·diag of the shrunk matrix is diagonal by construction: (1 − ρ) E[ssᵀ] remains and is positive
  // semidefinite.
  const at::Tensor moved = loss.shrinkage * loss.curvature.diagonal();
  const at::Tensor linear = loss.linear + 0.5 * moved;
  const at::Tensor matrix = loss.curvature - at::diag(moved);
  KnapsackRelaxation program(candidates);
  const auto oracle = [&](const at::Tensor& gradient) {
    return at::tensor(program.minimise(values_of(gradient)), at::kDouble);
  };
  at::Tensor shares = oracle((linear + 0.5 * matrix.diagonal()).contiguous());
  at::Tensor product = matrix.mv(shares);
  Relaxation best{.bound = -std::numeric_limits<double>::infinity(), .gradient = {}};
  for (int step = 0; step < kSteps; ++step) {
    const at::Tensor gradient = linear + product;
    const at::Tensor direction = oracle(gradient) - shares;
    const double value = (linear + 0.5 * product).dot(shares).item<double>();
    const double gap = -gradient.dot(direction).item<double>();
    best.bound = std::max(best.bound, value - gap);
    best.gradient.assign(values_of(gradient).begin(), values_of(gradient).end());
    if (gap <= kRelativeGap * std::abs(value)) break;
    const at::Tensor change = matrix.mv(direction);
    const double bend = direction.dot(change).item<double>();
    const double length = bend > 0 ? std::min(1.0, gap / bend) : 1.0;
    shares = shares + length * direction;
    product = product + length * change;
  }
  return best;
}

Selection minimise(const QuadraticLoss& loss, const Candidates& candidates, const Relaxation& relaxation,
                   const std::vector<Selection>& starts) {
  std::vector<Selection> all{solve_knapsack(candidates, loss.diagonal()),
                             solve_knapsack(candidates, relaxation.gradient), cheapest(candidates)};
  all.insert(all.end(), starts.begin(), starts.end());
  Selection best;
  double least = std::numeric_limits<double>::infinity();
  for (const Selection& start : all) {
    Selection found = exchange(loss, candidates, start);
    const double value = loss(found);
    if (value >= least) continue;
    least = value;
    best = std::move(found);
  }
  return best;
}

Selection brute_force_minimum(const QuadraticLoss& loss, const Candidates& candidates) {
  Selection best;
  double least = std::numeric_limits<double>::infinity();
  for_each_selection(candidates, [&](const Selection& selection) {
    const double value = loss(selection);
    if (value >= least) return;
    least = value;
    best = selection;
  });
  return best;
}

}  // namespace isobath::allocate
