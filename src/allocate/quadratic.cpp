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

/// Flat index of the set of each candidate. [n] int64.
at::Tensor set_of(const Candidates& candidates) {
  at::Tensor result = at::empty({candidates.size()}, at::kLong);
  for (int64_t set = 0; set < candidates.n_sets(); ++set)
    result
        .slice(0, candidates.first[static_cast<size_t>(set)], candidates.first[static_cast<size_t>(set) + 1])
        .fill_(set);
  return result;
}

/// Blocks between the sets of two candidates. [n, n] int64.
at::Tensor distances(const Scores& scores, const Candidates& candidates) {
  if (scores.block.empty()) return at::zeros({candidates.size(), candidates.size()}, at::kLong);
  ISOBATH_CHECK(std::ssize(scores.block) == candidates.n_sets(), "{} blocks of {} sets", scores.block.size(),
                candidates.n_sets());
  const at::Tensor block = at::tensor(scores.block, at::kLong).index_select(0, set_of(candidates));
  return (block.unsqueeze(0) - block.unsqueeze(1)).abs();
}

/// Sums over all pairs of different sets that lie d blocks apart, [n_distances] each.
struct Classes {
  at::Tensor pairs, correlation, square;
  at::Tensor noise;  ///< Σ of the squared standard errors of the correlations
};

/// correlation [n, n]: mean of z zᵀ over the draws, whose mean square is 1.
Classes classes_of(const Scores& scores, const Candidates& candidates, const at::Tensor& distance,
                   const at::Tensor& z, const at::Tensor& correlation) {
  const auto n = static_cast<double>(scores.n_sequences());
  at::Tensor squares = at::zeros_like(correlation);
  for (int64_t sequence = 0; sequence < scores.n_sequences(); ++sequence) {
    const at::Tensor rows = z.slice(0, sequence * scores.samples, (sequence + 1) * scores.samples);
    squares.add_((rows.t().mm(rows) / static_cast<double>(scores.samples)).square());
  }
  const at::Tensor variance = (squares / n - correlation.square()) / (n - 1);
  const at::Tensor set = set_of(candidates);
  const at::Tensor others = set.unsqueeze(0) != set.unsqueeze(1);
  const at::Tensor place = distance.masked_select(others);
  const auto sum = [&](const at::Tensor& values) {
    return at::bincount(place, values.masked_select(others));
  };
  return {sum(at::ones_like(correlation)), sum(correlation), sum(correlation.square()), sum(variance)};
}

constexpr int kDecays = 20;  // steps of θ from 0 to 1: the error is flat around its minimum

/// θ⁰, θ¹, … [n].
at::Tensor powers(double decay, int64_t n) {
  return at::pow(decay, at::arange(n, at::kDouble));
}

/// ρ and θ of least squared error about the means m of the classes, up to a constant:
/// E Σ (kept·(r − m) − (E r − m))² = Σ kept² (r − m)² − 2 kept ((r − m)² − noise) + …, kept = (1 − ρ)·θᵈ.
void fit_shrinkage(const Classes& classes, Coupling& coupling) {
  const at::Tensor spread = classes.square - classes.correlation.square() / classes.pairs.clamp_min(1);
  double least = 0;  // of ρ = 1
  for (int step = 0; step <= kDecays; ++step) {
    const double decay = static_cast<double>(step) / kDecays;
    const at::Tensor kept = powers(decay, spread.numel());
    const double quadratic = (kept.square() * spread).sum().item<double>(),
                 linear = (kept * (spread - classes.noise)).sum().item<double>();
    const double near = quadratic > 0 ? std::clamp(linear / quadratic, 0.0, 1.0) : 0;
    const double error = near * near * quadratic - 2 * near * linear;
    if (error >= least) continue;
    least = error;
    coupling.shrinkage = 1 - near;
    coupling.decay = decay;
  }
}

/// c and its decay, by least squares over all pairs: what the shrinkage took from the mean of each class.
void fit_common(const Classes& classes, Coupling& coupling) {
  if (coupling.shrinkage <= 0) return;
  const at::Tensor taken =
      classes.correlation * (1 - (1 - coupling.shrinkage) * powers(coupling.decay, classes.pairs.numel()));
  double least = 0;  // of c = 0
  for (int step = 0; step <= kDecays; ++step) {
    const double decay = static_cast<double>(step) / kDecays;
    const at::Tensor kept = coupling.shrinkage * powers(decay, classes.pairs.numel());
    const double quadratic = (kept.square() * classes.pairs).sum().item<double>(),
                 linear = (kept * taken).sum().item<double>();
    const double common = quadratic > 0 ? std::clamp(linear / quadratic, 0.0, 1.0) : 0;
    const double error = common * common * quadratic - 2 * common * linear;
    if (error >= least) continue;
    least = error;
    coupling.common = common;
    coupling.common_decay = decay;
  }
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

Scores Scores::with_values(at::Tensor rows) const {
  Scores result = *this;
  result.values = std::move(rows);
  return result;
}

QuadraticLoss estimate_loss(const Scores& scores, const Candidates& candidates,
                            std::optional<double> shrinkage) {
  const at::Tensor& s = scores.values;
  ISOBATH_CHECK(s.dim() == 2 && s.scalar_type() == at::kDouble && s.size(0) > 0 &&
                    s.size(1) == candidates.size() && scores.samples > 0 && s.size(0) % scores.samples == 0,
                "scores [sequences x {} draws, {}] f64 expected", scores.samples, candidates.size());
  ISOBATH_CHECK(scores.tokens_per_sequence > 0, "{} tokens per sequence", scores.tokens_per_sequence);
  const auto n_draws = static_cast<double>(s.size(0));
  const at::Tensor scale = s.square().mean(0).sqrt();
  const at::Tensor z = s / scale.masked_fill(scale == 0, 1);
  const at::Tensor correlation = z.t().mm(z) / n_draws, distance = distances(scores, candidates);
  QuadraticLoss loss;
  if (scores.n_sequences() > 1) {
    const Classes classes = classes_of(scores, candidates, distance, z, correlation);
    fit_shrinkage(classes, loss.coupling);
    if (shrinkage) loss.coupling.shrinkage = *shrinkage;
    fit_common(classes, loss.coupling);
  }
  const auto& [rho, decay, common, common_decay] = loss.coupling;
  const at::Tensor blocks = distance.to(at::kDouble);
  at::Tensor believed =
      correlation * at::pow(decay, blocks) * (1 - rho) + at::pow(common_decay, blocks) * (rho * common);
  believed.diagonal().fill_(1);
  loss.curvature = believed * at::outer(scale, scale) / scores.tokens_per_sequence;
  loss.linear = at::zeros({candidates.size()}, at::kDouble);
  if (scores.with_linear && s.size(0) > 1) {
    const at::Tensor mean = s.mean(0), square = mean.square();
    const at::Tensor error = (s.square().mean(0) - square) / (n_draws - 1);
    const at::Tensor kept = (1 - error / square.masked_fill(square == 0, 1)).clamp_min(0);
    loss.linear = mean * kept / scores.tokens_per_sequence;
  }
  return loss;
}

Relaxation relax(const QuadraticLoss& loss, const Candidates& candidates) {
  // ρ (1 − c)·diag of the matrix is diagonal by construction: the two tapered parts remain and are positive
  // semidefinite.
  const at::Tensor moved = loss.coupling.shrinkage * (1 - loss.coupling.common) * loss.curvature.diagonal();
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
