#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace isobath::quant {

enum class ActOrder { none, static_groups };

struct FactorSpec {
  double damping = 0.01;     ///< λ: λ·mean(diag H) is added to the diagonal
  double max_damping = 1.0;  ///< the ladder multiplies λ by 10 up to here
  ActOrder act_order = ActOrder::none;
};

/// What the column loop needs of H, computed once per module and shared by all row tiles.
struct Factor {
  at::Tensor upper;  ///< [C, C] f32: U, upper Cholesky factor of (H + λI)⁻¹ in column order `order`
  at::Tensor order;  ///< [C] i64 permutation (act-order), identity when none
  at::Tensor dead;   ///< [C] bool: H_jj = 0; such weights become 0
  at::Tensor
      importance;  ///< [C] f32 diag of H in original order (1 where dead): importance for round_to_nearest
  double damping = 0;       ///< λ that worked
  int64_t n_fallbacks = 0;  ///< steps of the ladder that were needed
  bool failed = false;  ///< no λ of the ladder worked: the caller falls back to D = 1, then round-to-nearest
};

/// f64 factorization of a symmetric H [C, C] f32. Deterministic at a fixed thread count.
/// Throws NumericError for a non-finite H (first row and column).
[[nodiscard]] Factor factorize(const at::Tensor& h, const FactorSpec& spec);

}  // namespace isobath::quant
