// The source of the device's kernels, run by the host (support/cuda_on_host).
#include "quant/device_refiner_cases.hpp"
#include "src/quant/device_refiner.hpp"

namespace isobath::quant {

static RefinedMatrix refine_in_kernels(const QuantizedMatrix& start, const at::Tensor& target,
                                       const Factor& factor, int64_t sweeps) {
  DeviceRefiner refiner(start, target, factor);
  const int64_t group_width = factor.n_columns() / n_groups(factor.n_columns(), start.spec);
  for (int64_t pass = 0; pass <= sweeps; ++pass)
    for (const Range& columns : refinement_slabs(panels_of(factor), group_width)) {
      const Slab slab = slab_of(factor, columns, pass > 0);
      pass == 0 ? refiner.load(slab) : refiner.sweep(slab);
    }
  QuantizedMatrix matrix = refiner.matrix();
  matrix.scale = matrix.scale.to(start.spec.storage);
  const at::Tensor difference =
      (dequantize(matrix).to(at::kDouble) - target.to(at::kDouble)).masked_fill(factor.dead, 0);
  const double squares = refiner.errors({0, target.size(0)}).square().sum(at::kDouble).item<double>(),
               norm = difference.square().sum().item<double>();
  return {matrix, 0.5 * factor.mean * (squares - factor.damping * norm)};
}

TEST(DeviceRefinerOnHost, AgreesWithTheHostsSweeps) {
  expect_agrees_with_host(refine_in_kernels);
}

TEST(DeviceRefinerOnHost, NeverRaisesTheObjectiveAndHelps) {
  expect_descent(refine_in_kernels);
}

TEST(DeviceRefinerOnHost, RowsDoNotDependOnOthers) {
  expect_rows_do_not_depend_on_others(refine_in_kernels);
}

}  // namespace isobath::quant
