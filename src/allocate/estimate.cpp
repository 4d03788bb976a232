#include <ATen/ATen.h>

#include <isobath/allocate/quadratic.hpp>
#include <isobath/core/error.hpp>
#include <map>
#include <set>

namespace isobath::allocate {
namespace {

/// Flat index of the set of each candidate. [n] int64.
at::Tensor set_of(const Candidates& candidates) {
  at::Tensor result = at::empty({candidates.size()}, at::kLong);
  for (int64_t set = 0; set < candidates.n_sets(); ++set)
    result
        .slice(0, candidates.first[static_cast<size_t>(set)], candidates.first[static_cast<size_t>(set) + 1])
        .fill_(set);
  return result;
}

void check(const Scores& scores, const Candidates& candidates) {
  const at::Tensor& s = scores.values;
  const int64_t n = candidates.size(), n_sets = candidates.n_sets();
  ISOBATH_CHECK(s.dim() == 2 && s.scalar_type() == at::kDouble && s.size(0) > 0 && s.size(1) == n &&
                    scores.samples > 0 && s.size(0) % scores.samples == 0,
                "scores [sequences x {} draws, {}] f64 expected", scores.samples, n);
  ISOBATH_CHECK(scores.tokens_per_sequence > 0, "{} tokens per sequence", scores.tokens_per_sequence);
  ISOBATH_CHECK(scores.block.empty() || std::ssize(scores.block) == n_sets, "{} blocks of {} sets",
                scores.block.size(), n_sets);
  ISOBATH_CHECK(scores.kind.empty() || (std::ssize(scores.kind) == n_sets && !scores.block.empty()),
                "{} kinds of {} sets in {} blocks", scores.kind.size(), n_sets, scores.block.size());
  ISOBATH_CHECK(
      std::ssize(scores.bits) == n || (scores.bits.empty() && scores.kind.empty() && !scores.prior.defined()),
      "{} widths of {} candidates", scores.bits.size(), n);
  ISOBATH_CHECK(!scores.prior.defined() || (scores.prior.dim() == 2 && scores.prior.size(1) == n &&
                                            scores.prior.size(0) == scores.n_sequences()),
                "a prior [{}, {}] expected", scores.n_sequences(), n);
}

// ---- correlations -----------------------------------------------------------------------------------------

/// Blocks between the sets of two candidates. [n, n] int64.
at::Tensor distances(const Scores& scores, const Candidates& candidates) {
  if (scores.block.empty()) return at::zeros({candidates.size(), candidates.size()}, at::kLong);
  const at::Tensor block = at::tensor(scores.block, at::kLong).index_select(0, set_of(candidates));
  return (block.unsqueeze(0) - block.unsqueeze(1)).abs();
}

/// The mean over blocks of the correlations of two candidates of one block, by their kinds and widths: [n, n]
/// f64, zeros between blocks, ones on the diagonal; the identity where kinds are unknown. z zᵀ of a block has
/// no negative eigenvalue, so neither has their mean: candidates that a block lacks count as zeros there,
/// which the root of both counts leaves positive semidefinite.
at::Tensor pooled_within_blocks(const Scores& scores, const Candidates& candidates,
                                const at::Tensor& correlation) {
  at::Tensor pooled = at::eye(candidates.size(), at::kDouble);
  if (scores.kind.empty()) return pooled;
  std::map<std::pair<int64_t, int64_t>, int64_t> roles;                // of kind and width
  std::map<int64_t, std::vector<std::pair<int64_t, int64_t>>> blocks;  // block -> candidates and their roles
  for (int64_t set = 0; set < candidates.n_sets(); ++set)
    for (int64_t k = candidates.first[static_cast<size_t>(set)];
         k < candidates.first[static_cast<size_t>(set) + 1]; ++k) {
      const auto role = roles.try_emplace(
          {scores.kind[static_cast<size_t>(set)], scores.bits[static_cast<size_t>(k)]}, std::ssize(roles));
      blocks[scores.block[static_cast<size_t>(set)]].emplace_back(k, role.first->second);
    }
  const auto n_roles = std::ssize(roles);
  at::Tensor sum = at::zeros({n_roles, n_roles}, at::kDouble), count = at::zeros({n_roles}, at::kDouble);
  const auto each_block = [&](const auto& use) {
    for (const auto& [block, members] : blocks) {
      std::vector<int64_t> candidate, role;
      for (const auto& [k, r] : members) {
        candidate.push_back(k);
        role.push_back(r);
      }
      ISOBATH_CHECK(std::set(role.begin(), role.end()).size() == role.size(),
                    "two sets of block {} are of one kind", block);
      use(at::tensor(candidate, at::kLong), at::tensor(role, at::kLong));
    }
  };
  each_block([&](const at::Tensor& candidate, const at::Tensor& role) {
    const at::Tensor found = correlation.index_select(0, candidate).index_select(1, candidate);
    sum.index_put_({role.unsqueeze(1), role.unsqueeze(0)}, found, true);
    count.index_put_({role}, at::ones({role.numel()}, at::kDouble), true);
  });
  at::Tensor mean = sum / at::outer(count, count).sqrt();
  mean.diagonal().fill_(1);
  each_block([&](const at::Tensor& candidate, const at::Tensor& role) {
    pooled.index_put_({candidate.unsqueeze(1), candidate.unsqueeze(0)},
                      mean.index_select(0, role).index_select(1, role));
  });
  return pooled;
}

/// Sums over all pairs of different sets that lie d blocks apart, [n_distances] each.
struct Classes {
  at::Tensor pairs, correlation;
  at::Tensor spread;  ///< Σ (correlation − what the class expects)²
  at::Tensor noise;   ///< Σ of the squared standard errors of the correlations
};

/// correlation [n, n]: mean of z zᵀ over the draws, whose mean square is 1. Within blocks `pooled` is what is
/// expected of a pair where kinds are known, else, as between blocks, the mean of the class.
Classes classes_of(const Scores& scores, const Candidates& candidates, const at::Tensor& distance,
                   const at::Tensor& z, const at::Tensor& correlation, const at::Tensor& pooled) {
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
  Classes classes{sum(at::ones_like(correlation)), sum(correlation), {}, sum(variance)};
  classes.spread = sum(correlation.square()) - classes.correlation.square() / classes.pairs.clamp_min(1);
  if (!scores.kind.empty() && classes.spread.numel() > 0)
    classes.spread[0] = sum((correlation - pooled).square())[0];
  return classes;
}

constexpr int kDecays = 20;  // steps of θ from 0 to 1: the error is flat around its minimum

/// θ⁰, θ¹, … [n].
at::Tensor powers(double decay, int64_t n) {
  return at::pow(decay, at::arange(n, at::kDouble));
}

/// ρ and θ of least squared error about what the classes expect, m, up to a constant:
/// E Σ (kept·(r − m) − (E r − m))² = Σ kept² (r − m)² − 2 kept ((r − m)² − noise) + …, kept = (1 − ρ)·θᵈ.
void fit_shrinkage(const Classes& classes, Coupling& coupling) {
  double least = 0;  // of ρ = 1
  for (int step = 0; step <= kDecays; ++step) {
    const double decay = static_cast<double>(step) / kDecays;
    const at::Tensor kept = powers(decay, classes.spread.numel());
    const double quadratic = (kept.square() * classes.spread).sum().item<double>(),
                 linear = (kept * (classes.spread - classes.noise)).sum().item<double>();
    const double near = quadratic > 0 ? std::clamp(linear / quadratic, 0.0, 1.0) : 0;
    const double error = near * near * quadratic - 2 * near * linear;
    if (error >= least) continue;
    least = error;
    coupling.shrinkage = 1 - near;
    coupling.decay = decay;
  }
}

/// c and its decay, by least squares over the pairs from `nearest` blocks apart on: what the shrinkage took
/// from the mean of each class.
void fit_common(const Classes& classes, int64_t nearest, Coupling& coupling) {
  const int64_t n = classes.pairs.numel();
  if (coupling.shrinkage <= 0 || n <= nearest) return;
  const auto far = [&](const at::Tensor& values) { return values.slice(0, nearest); };
  const at::Tensor taken =
      far(classes.correlation * (1 - (1 - coupling.shrinkage) * powers(coupling.decay, n)));
  double least = 0;  // of c = 0
  for (int step = 0; step <= kDecays; ++step) {
    const double decay = static_cast<double>(step) / kDecays;
    const at::Tensor kept = coupling.shrinkage * far(powers(decay, n));
    const double quadratic = (kept.square() * far(classes.pairs)).sum().item<double>(),
                 linear = (kept * taken).sum().item<double>();
    const double common = quadratic > 0 ? std::clamp(linear / quadratic, 0.0, 1.0) : 0;
    const double error = common * common * quadratic - 2 * common * linear;
    if (error >= least) continue;
    least = error;
    coupling.common = common;
    coupling.common_decay = decay;
  }
}

/// [n, n] f64, positive semidefinite, ones on the diagonal; fills in `coupling`.
at::Tensor believed_correlations(const Scores& scores, const Candidates& candidates, const at::Tensor& scale,
                                 Coupling& coupling) {
  const at::Tensor z = scores.values / scale.masked_fill(scale == 0, 1);
  const at::Tensor correlation = z.t().mm(z) / static_cast<double>(z.size(0));
  const at::Tensor distance = distances(scores, candidates);
  at::Tensor pooled = at::eye(candidates.size(), at::kDouble);
  if (scores.n_sequences() > 1) {
    pooled = pooled_within_blocks(scores, candidates, correlation);
    const Classes classes = classes_of(scores, candidates, distance, z, correlation, pooled);
    fit_shrinkage(classes, coupling);
    fit_common(classes, scores.kind.empty() ? 0 : 1, coupling);
    // Rounding may leave an eigenvalue of 0 below it.
    coupling.alone = std::clamp(at::linalg_eigvalsh(pooled).min().item<double>(), 0.0, 1.0);
  }
  const auto& [rho, decay, common, common_decay, alone] = coupling;
  const at::Tensor blocks = distance.to(at::kDouble);
  at::Tensor believed = correlation * at::pow(decay, blocks) * (1 - rho) + pooled * (rho * (1 - common)) +
                        at::pow(common_decay, blocks) * (rho * common);
  believed.diagonal().fill_(1);
  return believed;
}

// ---- squares ----------------------------------------------------------------------------------------------

/// Shrinks squares [n] towards the prior, width by width; returns each width's share of the prior.
std::map<int64_t, double> shrink_to_prior(const Scores& scores, at::Tensor& squares) {
  std::map<int64_t, double> shares;
  const int64_t n_sequences = scores.n_sequences();
  if (!scores.prior.defined() || n_sequences < 2) return shares;
  const at::Tensor of_sequence =
      scores.values.square().reshape({n_sequences, scores.samples, -1}).mean(1);  // [n_sequences, n]
  const at::Tensor error = of_sequence.var(0, true) / static_cast<double>(n_sequences);
  const at::Tensor prior = scores.prior.mean(0), width = at::tensor(scores.bits, at::kLong);
  for (const int64_t bits : std::set(scores.bits.begin(), scores.bits.end())) {
    const at::Tensor is_width = (width == bits).logical_and(prior > 0).logical_and(squares > 0);
    const at::Tensor index = is_width.nonzero().squeeze(1);
    if (index.numel() < 2) continue;
    const at::Tensor found = squares.index_select(0, index), there = prior.index_select(0, index);
    const at::Tensor expected = there * (found / there).log().mean().exp();
    const double noise = (error.index_select(0, index) / expected.square()).sum().item<double>(),
                 deviation = ((found - expected) / expected).square().sum().item<double>();
    const double share = deviation > 0 ? std::clamp(noise / deviation, 0.0, 1.0) : 0;
    squares.index_put_({index}, found + share * (expected - found));
    shares[bits] = share;
  }
  return shares;
}

}  // namespace

QuadraticLoss estimate_loss(const Scores& scores, const Candidates& candidates) {
  check(scores, candidates);
  const at::Tensor& s = scores.values;
  at::Tensor squares = s.square().mean(0);
  QuadraticLoss loss;
  const at::Tensor believed = believed_correlations(scores, candidates, squares.sqrt(), loss.coupling);
  loss.linear = at::zeros({candidates.size()}, at::kDouble);
  if (scores.with_linear && s.size(0) > 1) {
    const at::Tensor mean = s.mean(0), square = mean.square();
    const at::Tensor error = (squares - square) / static_cast<double>(s.size(0) - 1);
    const at::Tensor kept = (1 - error / square.masked_fill(square == 0, 1)).clamp_min(0);
    loss.linear = mean * kept / scores.tokens_per_sequence;
  }
  loss.prior_share = shrink_to_prior(scores, squares);
  const at::Tensor scale = squares.sqrt();
  loss.curvature = believed * at::outer(scale, scale) / scores.tokens_per_sequence;
  return loss;
}

}  // namespace isobath::allocate
