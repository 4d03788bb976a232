#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/partition.hpp>
#include <optional>
#include <vector>

/// H + λI = R Rᵀ with R upper triangular: the Cholesky factorization of H with rows and columns reversed.
///
/// The GPTQ loop over U, the upper Cholesky factor of the inverse, needs no inverse: U = R⁻¹, and the value
/// that column k is rounded to is w_k + Σ_{i<k} (w_i − ŵ_i) R_ik / R_kk (METHOD §3). What is left of the
/// objective is exact, too: tr(ΔW (H + λI) ΔWᵀ) = Σ_k R_kk² Σ_rows (target_k − ŵ_k)².
///
/// A panel is columns [begin, end) of a triangular or symmetric [C, C] matrix with its rows [0, end): all
/// that an upper triangle has of these columns. Panels are what ranks own, send, and solve with one by one,
/// so that a matrix need not stand whole anywhere.
namespace isobath::quant {

/// Columns of a panel: wide enough for products at the machine's rate, narrow enough that the ranks which
/// wait for one to be factorized wait for little; whole steps of the solver (128) and of the Gram kernel
/// (48).
inline constexpr int64_t kPanel = 384;

/// Widest H that one rank factorizes, so that several of them are factorized at once; the panels of a wider
/// one are spread over the ranks.
inline constexpr int64_t kWholeColumns = 2048;

/// Widest H for what needs it whole on one rank: gptaq, act-order.
inline constexpr int64_t kLargestWhole = 16384;

enum class ActOrder { none, static_groups };

struct FactorSpec {
  double damping = 0.01;     ///< λ: λ·mean(diag H) is added to the diagonal
  double max_damping = 1.0;  ///< the ladder multiplies λ by 10 up to here
  ActOrder act_order = ActOrder::none;
  int64_t panel_width = kPanel;
};

/// What the column loop needs of H, computed once per H and shared by all row tiles.
struct Factor {
  at::Tensor order;         ///< [C] i64 permutation (act-order), identity when none
  at::Tensor dead;          ///< [C] bool, original order: H_jj = 0; such weights become 0
  at::Tensor importance;    ///< [C] f32 diag of H in original order (1 where dead)
  double mean = 1;          ///< of the diagonal over live columns
  double damping = 0;       ///< λ that worked
  int64_t n_fallbacks = 0;  ///< steps of the ladder that were needed
  bool failed = false;  ///< no λ of the ladder worked: the caller falls back to D = 1, then round-to-nearest
  at::Tensor curvature;            ///< [C] f64, column order `order`: R_kk²
  std::vector<at::Tensor> panels;  ///< of R diag(R)⁻¹ in column order `order`: [end, width] f32, 1 on the
                                   ///< diagonal, 0 below. Undefined where another rank owns the panel

  [[nodiscard]] int64_t n_columns() const { return order.size(0); }
};

/// Columns of all panels of a matrix.
[[nodiscard]] std::vector<Range> column_panels(int64_t n_columns, int64_t width);

/// f64 factorization of a symmetric H [C, C] f32, in place over f64 panels. Deterministic at a fixed thread
/// count.
///
/// Memory   4 C² bytes of f64 panels, which become 2 C² of f32.
/// Cost     C³/6 multiply-adds.
/// Throws   NumericError for a non-finite H (first row and column).
[[nodiscard]] Factor factorize(const at::Tensor& h, const FactorSpec& spec);

/// A factor without panels from the diagonal of H [C] f64: order, dead columns, importance, mean, first λ.
[[nodiscard]] Factor factor_of_diagonal(const at::Tensor& diagonal, const FactorSpec& spec);

/// f64 panel of H + λI from columns of H in the factor's order, [end, width] f32 of which the upper triangle
/// counts: dead rows and columns zeroed, the diagonal damped.
[[nodiscard]] at::Tensor damped_panel(const at::Tensor& columns, const Factor& factor);

/// A panel [end, width] f64, from which all later ones were subtracted, becomes that of R, in place. False
/// when H + λI is not positive definite; the panel is spoilt then.
[[nodiscard]] bool factorize_panel(at::Tensor& panel);

/// Takes the share of a later panel of R from an earlier panel of H, in place.
void subtract_panel(at::Tensor& panel, const at::Tensor& later);

/// R diag(R)⁻¹ f32 and R_kk² f64 of a panel of R; nothing when one is not finite or the diagonal not
/// positive.
struct FeedbackPanel {
  at::Tensor panel;      ///< [end, width] f32
  at::Tensor curvature;  ///< [width] f64
};
[[nodiscard]] std::optional<FeedbackPanel> feedback_panel(const at::Tensor& panel);

/// Climbs one step of the damping ladder; false, and `failed`, when it ends.
[[nodiscard]] bool raise_damping(Factor& factor, const FactorSpec& spec);

/// Throws NumericError naming the first non-finite entry of columns of H that start at `first_column`.
void check_finite(const at::Tensor& columns, int64_t first_column = 0);

/// R [C, C] f64 in the factor's column order; all panels must be here.
[[nodiscard]] at::Tensor upper_root(const Factor& factor);

}  // namespace isobath::quant
