#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/factor.hpp>
#include <isobath/quant/grid.hpp>
#include <isobath/quant/slab.hpp>

#include "cuda/refine.hpp"

namespace isobath::quant {

/// Refiner's sweeps in kernels for CUDA tensors, the same steps in the same order: all rows of this rank move
/// together, one thread a row. A row's bits depend on no other row, but differ from the host's where sums of
/// products are rounded differently.
class DeviceRefiner {
 public:
  /// As Refiner's constructor; target on the device.
  DeviceRefiner(const QuantizedMatrix& start, const at::Tensor& target, const Factor& factor);

  void load(const Slab& slab);
  void sweep(const Slab& slab);
  [[nodiscard]] bool is_settled() const { return is_settled_; }

  /// On the host, scales in f32.
  [[nodiscard]] QuantizedMatrix matrix() const;
  /// Eᵀ/√mean of some rows, [C, rows] f32 on the host.
  [[nodiscard]] at::Tensor errors(Range rows) const;

 private:
  /// What a slab's columns are on the device.
  struct Columns {
    Range range;
    at::Tensor groups;         ///< [width] i64
    at::Tensor is_live;        ///< [width, 1] f32
    at::Tensor values, steps;  ///< [width, R] f32
  };
  [[nodiscard]] Columns columns_of(const Slab& slab) const;
  void move_codes(Columns& columns, const at::Tensor& curvature, at::Tensor& gradient);
  void move_grids(Columns& columns, const at::Tensor& curvature, at::Tensor& gradient);
  /// Adds what a change of the slab's values says to the errors.
  void add(const at::Tensor& slab_rows, const at::Tensor& difference, int64_t first_column);

  GridSpec spec_;
  c10::Device device_;
  at::Tensor target_;  ///< [R, C] of any float dtype
  int64_t n_rows_, n_columns_;
  int64_t width_;  ///< columns of a group
  bool is_permuted_;
  cuda::GridRules rules_;
  at::Tensor order_;   ///< [C] i64
  at::Tensor live_;    ///< [C] f32, order of the factor
  at::Tensor codes_;   ///< [C, R] i8, order of the factor
  at::Tensor scale_;   ///< [G, R] f32
  at::Tensor zero_;    ///< [G, R] i8
  at::Tensor errors_;  ///< [C, R] f32: Eᵀ/√mean, order of the factor
  at::Tensor moved_;   ///< bool: whether a value changed since the sweep began
  bool is_settled_ = false;
};

}  // namespace isobath::quant
