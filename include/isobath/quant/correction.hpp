#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/row_solver.hpp>
#include <vector>

/// The asymmetric objective ½ ‖D^½ (X̃Wᵀ − XŴᵀ)‖²: what a linear gave in the original model (input X̃)
/// against what it gives behind the quantized prefix (input X). With H = XᵀDX and C = (X̃−X)ᵀDX it is, up to
/// a constant, ½ tr(ΔW H ΔWᵀ) − tr(W C ΔWᵀ), ΔW = Ŵ − W. Its minimum without quantization is W + W C H⁻¹.
///
/// A correction W → W + a·Z of the target that is quantized instead of W: QEP's Z = W C (H + λI)⁻¹, the way
/// to that minimum under a ridge, or GPTAQ's.
///
/// Where the output is added to a residual stream that itself lacks R = r̃ − r, the linear can make up for
/// that too: ½ ‖D^½ (ρR + X̃Wᵀ − XŴᵀ)‖² has W C + ρP in the place of W C, P = RᵀDX.
namespace isobath::quant {

/// How H is factorized for QEP: λ in mean diagonals over live columns, raised tenfold until H is positive
/// definite.
[[nodiscard]] FactorSpec ridge_spec(double ridge);
/// Throws NumericError when no ridge helped: H holds NaN, or is not a covariance.
void check_ridge(const Factor& factor);

/// Rows of W on their way to QEP's target, fed with panels: of C from the first to the last, of the ridge
/// factor from the last to the first, and again from the first to the last; panels on any device. Strips of
/// rows give the same rows as one call on all rows. Deterministic, local.
///
/// Memory   8 C bytes a row.
/// Cost     C² multiply-adds a row for W C, and C² for the two substitutions.
/// Source   Arai & Ichikawa, QEP (2025): there a = ½, λ = 1.
class CorrectedRows {
 public:
  /// w [R, C] any float dtype, CPU or a CUDA device, where all of it then happens; strips of `strip_rows`,
  /// a multiple of kRowTile: of those fixed shapes are the products that fix the bits.
  explicit CorrectedRows(const at::Tensor& w, int64_t strip_rows = kRowTile);
  /// From now on C has the rows of P below its own. rows [R] i64: those of w in P. Before `multiply`.
  void add_residual(const at::Tensor& rows, double share);
  /// Takes columns of C [C, width] f32, or of C and P [C + d_model, width].
  void multiply(const at::Tensor& c, Range columns);
  /// Takes a panel of R diag(R)⁻¹ [end, width] f32 of H + λI = R Rᵀ, in natural order.
  void substitute_back(const at::Tensor& panel);
  /// The same; curvature: R_kk² of all columns.
  void substitute_forward(const at::Tensor& panel, const at::Tensor& curvature);

  /// W C + ρP of some whole strips' rows, after the last multiply, [rows, C] f32 on the device of w.
  [[nodiscard]] at::Tensor products(Range rows) const;
  /// Z [R, C] f32 after the last substitution.
  [[nodiscard]] at::Tensor take_solution();

 private:
  template <class Visit>
  void for_each_strip(const Visit& visit);

  int64_t n_rows_, strip_rows_;
  at::Tensor residual_rows_;
  double residual_share_ = 0;  ///< ρ
  c10::Device device_;
  std::vector<at::Tensor> weights_, products_, solution_;  ///< of each strip [C, strip_rows] f32
};

/// M = triu(C Uᵀ, 1) U, U = R⁻¹, by two triangular solves in the factor's column order, and Z = W M: the
/// later columns make up for what the deviation of the input does through each column. c [C, C] f32 CPU ->
/// [C, C] f32 in original column order, in f64.
/// Source   Li et al., GPTAQ (2025), P; there a = ¼.
/// Differs  there the deviation is weighted with the column as the loop has changed it, here with the
///          original one, whose output is the target. Then all that the loop would add is known before it
///          starts.
[[nodiscard]] at::Tensor gptaq_correction(const at::Tensor& c, const Factor& factor);

/// W + strength·W·M in f32. w [R, C] any float dtype -> [R, C] f32.
[[nodiscard]] at::Tensor corrected(const at::Tensor& w, const at::Tensor& m, double strength);

/// Asymmetric objective of Ŵ minus that of W, in f64: 0 for Ŵ = W, negative when Ŵ makes up for more than it
/// adds. difference  Ŵ − W [R, C], 0 in dead columns; objective  ½ tr(ΔW H ΔWᵀ); products  W C + ρP [R, C].
[[nodiscard]] double asymmetric_objective(double objective, const at::Tensor& difference,
                                          const at::Tensor& products);

}  // namespace isobath::quant
