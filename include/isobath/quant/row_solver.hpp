#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>
#include <memory>

namespace isobath::quant {

class DeviceLoop;

/// Rows that advance together in vector lanes; tiles are multiples of it.
inline constexpr int64_t kRowTile = 64;

/// Rows of a tile, the unit that ranks and threads share, of a matrix with `n_rows` rows: a function of the
/// shape alone, so that a row's bits never depend on how rows are dealt. Taller tiles make better matrix
/// products, but enough of them must be left for all.
[[nodiscard]] int64_t tile_rows(int64_t n_rows);

/// The GPTQ column loop for some rows, fed with the panels of the factor one by one: no more of the factor
/// than a panel need be in memory. Column k is rounded from w_k + Σ_{i<k} (w_i − ŵ_i) R_ik / R_kk: for each
/// block of 128 columns one product with all errors so far, then column by column. Groups without act-order
/// are fitted on current columns when the loop reaches them; with act-order all grids are fitted first, on
/// original columns. Grids are fitted with the weights h_k = R_kk², the curvature left after compensation.
///
/// Memory   4 C bytes a row, 1 for the codes; the panel in work, or those of a group wider than one. On a
///          device the same, there.
/// Cost     C²/2 multiply-adds a row.
/// Source   Frantar et al., GPTQ (ICLR 2023), Algorithm 1, in the form of METHOD §3. Differs  from the paper
///          in clip search and in the weights of the fit.
class RowSolver {
 public:
  /// w [R, C] any float dtype, CPU or a CUDA device, where the same loop runs in its kernels. `factor`, on
  /// the CPU, must outlive the solver; its panels may be missing. Throws NumericError naming the first
  /// non-finite weight.
  RowSolver(const at::Tensor& w, const Factor& factor, const GridSpec& spec, int64_t tile_rows = kRowTile);
  ~RowSolver();
  RowSolver(RowSolver&&) noexcept;

  /// Takes the next panel of R diag(R)⁻¹, [end, width] f32 contiguous, any device, and solves as many columns
  /// as it allows.
  void advance(const at::Tensor& panel);

  /// The codes, after the last panel, on the device of w.
  [[nodiscard]] QuantizedMatrix take();

  /// ½ tr(ΔW H ΔWᵀ) of each tile against the weights given, [tiles] f64 on the CPU, after the last panel:
  /// exact up to the f32 rounding of its parts, ½ Σ_k R_kk² (target_k − ŵ_k)² − ½ λ‖ΔW‖².
  [[nodiscard]] at::Tensor objectives() const;

 private:
  class Loop;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<DeviceLoop> device_loop_;  ///< in place of the other where w is on a device
};

/// ½ tr(ΔW H ΔWᵀ) of a given ΔW from the panels of H's factor: ½ ‖ΔW R‖² − ½ λ‖ΔW‖², half the work of a
/// product with H.
class FactoredObjective {
 public:
  /// difference [R, C] f32, original column order; what it holds in dead columns does not count.
  FactoredObjective(const at::Tensor& difference, const Factor& factor);
  /// Takes the next panel, as RowSolver.
  void advance(const at::Tensor& panel);
  /// After the last panel.
  [[nodiscard]] double value() const;

 private:
  const Factor& factor_;
  at::Tensor errors_;  ///< [C, R] in the factor's column order
  double squares_ = 0;
};

}  // namespace isobath::quant
