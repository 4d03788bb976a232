#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>
#include <isobath/quant/row_solver.hpp>
#include <isobath/quant/slab.hpp>
#include <memory>

namespace isobath::quant {

class DeviceRefiner;

/// Lowers ½ tr((Ŵ−T) (H + λI) (Ŵ−T)ᵀ) from a quantized start by coordinate descent, λ that of the factor: the
/// undamped objective is free to move weights along directions that few calibration tokens determine. With
/// H + λI = R Rᵀ and E = (Ŵ−T)R the objective is ½‖E‖², its gradient at columns b is E Rᵀ[:, b], and a move
/// of those columns adds to E what the rows b of R say: H need not stand anywhere, and R is needed slab by
/// slab.
///
/// A sweep visits every slab: each of its codes (the nearest to ŵ_j − g_j/H_jj, the minimum over that code),
/// then the grid of each group that lies within it (least-squares scale for its codes; asymmetric grids also
/// try the zero points next to theirs). A move is taken only if the objective of the stored values, as a
/// loader sees them, falls: it never rises beyond f32 rounding. Act-order scatters groups: grids stay.
///
/// Strips of kRowTile rows give the same rows as one call on all rows. Deterministic, local.
/// Memory   5 C bytes a row for E and codes, and the slab in work; on a device 8 bytes a row and column of
/// that slab, too. Cost     C²/2 multiply-adds a row to load and C² a sweep. Source   coordinate descent on
/// codes: Behdin et al., QuantEase (2023); METHOD §3.
class Refiner {
 public:
  /// start   codes and grids of T, from gptq or round_to_nearest
  /// target  T [R, C] any float dtype: the weights, or the corrected ones of correction.hpp; on a CUDA device
  ///         the same sweeps run in its kernels
  /// factor  of H; its panels may be missing. It must outlive this. Dead columns keep value 0.
  Refiner(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor);
  ~Refiner();
  Refiner(Refiner&&) noexcept;

  /// Once for each slab, before the first sweep.
  void load(const Slab& slab);
  /// Once for each slab in order, for each sweep. Strips that a sweep left as they were do nothing more.
  void sweep(const Slab& slab);
  /// Whether the last whole sweep found nothing to gain: more of them change nothing. Before the first:
  /// false.
  [[nodiscard]] bool is_settled() const;

  /// Σ over the live columns' ½ tr((Ŵ−T) H (Ŵ−T)ᵀ), undamped, of each tile of so many rows: [tiles] f64.
  [[nodiscard]] at::Tensor objectives(int64_t tile_rows) const;
  /// On the CPU.
  [[nodiscard]] QuantizedMatrix take();

 private:
  class Host;
  /// Scales in f32.
  [[nodiscard]] QuantizedMatrix matrix() const;

  at::Tensor target_;
  const Factor& factor_;
  std::unique_ptr<Host> host_;
  std::unique_ptr<DeviceRefiner> device_;  ///< in place of the other where the target is on a device
};

/// A Refiner over a factor whose panels are all here, until it is settled or `sweeps` are done. target [R, C]
/// f32 CPU.
[[nodiscard]] QuantizedMatrix refine(const QuantizedMatrix& start, const at::Tensor& target,
                                     const Factor& factor, int64_t sweeps);

}  // namespace isobath::quant
