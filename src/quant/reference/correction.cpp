#include <ATen/ATen.h>

#include <isobath/quant/reference.hpp>

namespace isobath::quant::reference {

at::Tensor least_squares_target(const at::Tensor& w, const at::Tensor& x_original, const at::Tensor& x,
                                const at::Tensor& token_weights, double ridge, const at::Tensor& residual) {
  const at::Tensor root = token_weights.to(at::kDouble).sqrt().unsqueeze(1);
  const at::Tensor wide = w.to(at::kDouble), identity = at::eye(w.size(1), at::kDouble);
  at::Tensor output = x_original.to(at::kDouble).mm(wide.t());
  if (residual.defined()) output += residual.to(at::kDouble);
  // ‖D^½ (R + X̃wᵀ − Xvᵀ)‖² + ridge·‖v − w‖² as one least-squares problem for v.
  const at::Tensor inputs = at::cat({root * x.to(at::kDouble), std::sqrt(ridge) * identity});
  const at::Tensor wanted = at::cat({root * output, std::sqrt(ridge) * wide.t()});
  return std::get<0>(at::linalg_lstsq(inputs, wanted)).t();
}

at::Tensor gptaq_target(const at::Tensor& w, const at::Tensor& c, const at::Tensor& h) {
  const at::Tensor wide = w.to(at::kDouble);
  at::Tensor target = wide.clone();
  const int64_t n_columns = w.size(1);
  for (int64_t i = 0; i + 1 < n_columns; ++i) {
    const int64_t n_later = n_columns - i - 1;
    const at::Tensor later_h = h.to(at::kDouble).narrow(0, i + 1, n_later).narrow(1, i + 1, n_later);
    const at::Tensor later_c = c[i].to(at::kDouble).narrow(0, i + 1, n_later).unsqueeze(0);
    target.narrow(1, i + 1, n_later).add_(wide.narrow(1, i, 1).mm(later_c.mm(at::linalg_inv(later_h))));
  }
  return target;
}

}  // namespace isobath::quant::reference
