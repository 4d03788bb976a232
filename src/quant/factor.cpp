#include <ATen/ATen.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/quant/factor.hpp>

namespace isobath::quant {

static void check_finite(const at::Tensor& h) {
  // One bad entry makes the sum non-finite; the search for it is paid only then.
  if (std::isfinite(h.sum(at::kDouble).item<double>())) return;
  const at::Tensor bad = at::isfinite(h).logical_not().nonzero();
  if (bad.size(0) == 0) return;
  const auto row = bad[0][0].item<int64_t>(), column = bad[0][1].item<int64_t>();
  fail<NumericError>(
      "the Hessian of the module is not finite: first at row {}, column {} ({}), {} of {} entries; its "
      "calibration "
      "activations or gradients overflowed, use a wider dtype or look for a corrupt sequence",
      row, column, h[row][column].item<double>(), bad.size(0), h.numel());
}

/// U = R⁻¹ where H = R Rᵀ, R upper triangular: one Cholesky factorization with rows and columns reversed and
/// one triangular solve give the upper Cholesky factor of H⁻¹ without forming the inverse. Undefined when H
/// is not positive definite.
static at::Tensor upper_factor_of_inverse(const at::Tensor& h) {
  const auto [lower, info] = at::linalg_cholesky_ex(h.flip({0, 1}));
  if (info.item<int>() != 0) return {};
  const at::Tensor identity = at::eye(h.size(0), h.options());
  const at::Tensor upper =
      at::linalg_solve_triangular(lower, identity, /*upper=*/false).flip({0, 1}).to(at::kFloat).contiguous();
  const bool usable = at::isfinite(upper).all().item<bool>() && (upper.diagonal() > 0).all().item<bool>();
  return usable ? upper : at::Tensor();
}

Factor factorize(const at::Tensor& h, const FactorSpec& spec) {
  ISOBATH_CHECK(h.dim() == 2 && h.size(0) == h.size(1), "H must be square");
  ISOBATH_CHECK(spec.damping >= 0 && spec.max_damping >= spec.damping, "damping {} … {}", spec.damping,
                spec.max_damping);
  const int64_t n_columns = h.size(0);
  check_finite(h);

  Factor factor;
  const at::Tensor diagonal = h.diagonal().to(at::kDouble);
  factor.dead = diagonal == 0;
  factor.importance = at::where(factor.dead, at::ones({}, at::kDouble), diagonal).to(at::kFloat).contiguous();
  factor.order = spec.act_order == ActOrder::static_groups
                     ? std::get<1>(at::sort(diagonal, /*stable=*/true, /*dim=*/0, /*descending=*/true))
                     : at::arange(n_columns, at::kLong);

  at::Tensor ordered = h.to(at::kDouble).index_select(0, factor.order).index_select(1, factor.order);
  const at::Tensor ordered_dead = factor.dead.index_select(0, factor.order);
  const auto n_live = n_columns - factor.dead.sum().item<int64_t>();
  const double mean = n_live > 0 ? diagonal.sum().item<double>() / static_cast<double>(n_live) : 1.0;
  ordered.masked_fill_(ordered_dead.unsqueeze(0), 0).masked_fill_(ordered_dead.unsqueeze(1), 0);
  // Any positive diagonal does for a dead column; the mean keeps the matrix well scaled.
  const at::Tensor undamped = at::where(ordered_dead, at::full({}, mean, at::kDouble), ordered.diagonal());

  constexpr double kFirstStep = 0.01, kGrowth = 10, kSlack = 1 + 1e-9;
  factor.damping = spec.damping;
  while (true) {
    ordered.diagonal().copy_(undamped + factor.damping * mean);
    factor.upper = upper_factor_of_inverse(ordered);
    if (factor.upper.defined()) return factor;
    const double next = factor.damping > 0 ? factor.damping * kGrowth : kFirstStep;
    if (next > spec.max_damping * kSlack) break;
    factor.damping = next;
    ++factor.n_fallbacks;
  }
  factor.failed = true;
  return factor;
}

}  // namespace isobath::quant
