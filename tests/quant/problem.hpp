#pragma once
#include <ATen/ATen.h>

/// Small random layers whose inputs are correlated and of unequal size, as activations are.
namespace isobath::quant {

struct Problem {
  at::Tensor w;  ///< [R, C] f32
  at::Tensor h;  ///< [C, C] f32, symmetric positive definite
};

inline at::Generator test_generator(uint64_t seed) {
  return at::detail::createCPUGenerator(seed);
}

inline Problem random_problem(int64_t n_rows, int64_t n_columns, uint64_t seed) {
  auto generator = test_generator(seed);
  const auto f64 = at::TensorOptions(at::kDouble);
  const at::Tensor mix = at::eye(n_columns, f64) + at::randn({n_columns, n_columns}, generator, f64) /
                                                       std::sqrt(static_cast<double>(n_columns));
  const at::Tensor sizes = at::exp(0.7 * at::randn({n_columns}, generator, f64));
  const at::Tensor x = (at::randn({3 * n_columns, n_columns}, generator, f64) * sizes).mm(mix);
  const at::Tensor h = x.t().mm(x) / static_cast<double>(x.size(0));
  return {0.05 * at::randn({n_rows, n_columns}, generator, at::TensorOptions(at::kFloat)),
          (0.5 * (h + h.t())).to(at::kFloat)};
}

}  // namespace isobath::quant
