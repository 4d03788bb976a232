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

Scores Scores::of_sequences(const at::Tensor& index) const {
  Scores result = *this;
  const at::Tensor draws =
      (index.unsqueeze(1) * samples + at::arange(samples, at::kLong).unsqueeze(0)).reshape({-1});
  result.values = values.index_select(0, draws);
  if (prior.defined()) result.prior = prior.index_select(0, index);
  return result;
}

Scores Scores::without_prior() const {
  Scores result = *this;
  result.prior = at::Tensor();
  return result;
}

Relaxation relax(const QuadraticLoss& loss, const Candidates& candidates) {
  // ρ (1 − c)·(means within blocks) has no eigenvalue below ρ (1 − c)·alone: so much of the diagonal can go,
  // and the rest stays positive semidefinite beside the two tapered parts.
  const Coupling& coupling = loss.coupling;
  const at::Tensor moved =
      coupling.shrinkage * (1 - coupling.common) * coupling.alone * loss.curvature.diagonal();
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
