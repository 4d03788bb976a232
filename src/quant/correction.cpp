#include <isobath/quant/correction.hpp>

#include <ATen/ATen.h>

#include <isobath/core/error.hpp>
#include <isobath/quant/solver.hpp>

namespace isobath::quant {

at::Tensor qep_correction(const at::Tensor& c, const at::Tensor& h, double ridge) {
  ISOBATH_CHECK(c.sizes() == h.sizes() && h.size(0) == h.size(1), "C and H must be square and of one size");
  ISOBATH_CHECK(ridge > 0, "ridge {}", ridge);
  const at::Tensor diagonal = h.diagonal().to(at::kDouble);
  const auto n_live = (diagonal > 0).sum().item<int64_t>();
  if (n_live == 0) return at::zeros_like(h);
  const double mean = diagonal.sum().item<double>() / static_cast<double>(n_live);
  constexpr double kGrowth = 10, kLargestRidge = 1e6;
  for (at::Tensor damped = h.to(at::kDouble); ridge <= kLargestRidge; ridge *= kGrowth) {
    damped.diagonal().copy_(diagonal + ridge * mean);
    const auto [lower, info] = at::linalg_cholesky_ex(damped);
    if (info.item<int>() != 0) continue;
    return at::cholesky_solve(c.to(at::kDouble).t(), lower).t().to(at::kFloat).contiguous();
  }
  fail<NumericError>(
      "H is not positive definite even with a diagonal of {:g} added; it holds NaN or is not a "
      "covariance",
      kLargestRidge * mean);
}

at::Tensor gptaq_correction(const at::Tensor& c, const Factor& factor) {
  ISOBATH_CHECK(!factor.failed, "the correction needs a factorization that succeeded");
  const at::Tensor root = upper_root(factor);  // U = R⁻¹
  const at::Tensor ordered = c.to(at::kDouble).index_select(0, factor.order).index_select(1, factor.order);
  const at::Tensor later =
      at::linalg_solve_triangular(root.t(), ordered, /*upper=*/false, /*left=*/false).triu_(1);
  const at::Tensor compensation = at::linalg_solve_triangular(root, later, /*upper=*/true, /*left=*/false);
  const at::Tensor inverse = at::argsort(factor.order);
  return compensation.index_select(0, inverse).index_select(1, inverse).to(at::kFloat).contiguous();
}

at::Tensor corrected(const at::Tensor& w, const at::Tensor& m, double strength) {
  const at::Tensor weights = w.to(at::kFloat);
  return at::addmm(weights, weights, m, 1, strength);
}

double asymmetric_objective(const at::Tensor& w, const at::Tensor& w_hat, const at::Tensor& h,
                            const at::Tensor& c) {
  const at::Tensor wide = w.to(at::kDouble), difference = w_hat.to(at::kDouble) - wide;
  return objective(w, w_hat, h) - (wide.mm(c.to(at::kDouble)) * difference).sum().item<double>();
}

}  // namespace isobath::quant
