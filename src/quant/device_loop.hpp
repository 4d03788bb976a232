#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/quant/row_solver.hpp>

#include "column_loop.hpp"
#include "cuda/columns.hpp"

namespace isobath::quant {

/// RowSolver's column loop in kernels for CUDA tensors, the same steps in the same order: all rows of this
/// rank advance together, one thread or warp a row. A row's bits depend on no other row, but differ from the
/// host's where sums of products are rounded differently.
class DeviceLoop {
 public:
  /// As RowSolver's constructor; waits for the device once.
  DeviceLoop(const at::Tensor& w, const Factor& factor, const GridSpec& spec, int64_t tile_rows);

  void advance(const at::Tensor& panel);
  [[nodiscard]] QuantizedMatrix take();
  [[nodiscard]] at::Tensor objectives() const;

 private:
  [[nodiscard]] cuda::Grids grids_of(int64_t group);
  [[nodiscard]] cuda::Block view(at::Tensor& targets, Range block);
  void fit(const at::Tensor& columns, int64_t first_group, int64_t n_groups);
  void load_feedback(Range block);
  void solve_block(Range block);
  void enter_wide_group(int64_t begin);
  [[nodiscard]] at::Tensor settled_group(int64_t begin);
  [[nodiscard]] at::Tensor current(Range block) const;
  [[nodiscard]] at::Tensor with_feedback(Range columns, Range from) const;
  void add_products(const at::Tensor& errors, Range from, Range columns, at::Tensor& targets) const;

  GridSpec spec_;
  c10::Device device_;
  int64_t n_rows_, n_columns_, tile_rows_;
  ColumnBlocks blocks_;
  double largest_curvature_, added_;  ///< R_kk², and λ·mean(diag H)
  at::Tensor factors_;                ///< [n] f32, shrink factors of the clip search
  cuda::GridRules rules_;
  at::Tensor order_;             ///< [C] i64
  at::Tensor importance_;        ///< [C] f32, original order, at most 1 in each group
  at::Tensor curvature_;         ///< [C] f32, order of the loop, at most 1
  at::Tensor errors_;            ///< [C, R], order of the loop: w − ŵ of solved columns, w of the others
  at::Tensor wide_;              ///< [width, R]: a wide group's columns when the loop reached it
  at::Tensor codes_;             ///< [C, R] i8, original order
  at::Tensor scale_;             ///< [G, R] f32
  at::Tensor zero_;              ///< [G, R] i8
  at::Tensor sums_;              ///< [2, R] f64: Σ (R_kk² / largest) (target_k − ŵ_k)², ‖ΔW‖²
  at::Tensor feedback_;          ///< [kBlock, kBlock]
  at::Tensor settled_, shifts_;  ///< [kBlock, R]
  Panels panels_;
  int64_t next_ = 0;  ///< first column that is not solved
};

}  // namespace isobath::quant
