#include <ATen/Context.h>

#include <isobath/quant/correction.hpp>

#include "quant/device_refiner_cases.hpp"

namespace isobath::quant {

/// Refiner and CorrectedRows on CUDA tensors; device_refiner_on_host_test runs the first one's source on the
/// host.
class RowsOnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no CUDA device on this machine";
  }
};

static RefinedMatrix refine_on_device(const QuantizedMatrix& start, const at::Tensor& target,
                                      const Factor& factor, int64_t sweeps) {
  Refiner refiner(start, target.cuda(), factor);
  const int64_t group_width = factor.n_columns() / n_groups(factor.n_columns(), start.spec);
  const auto part = [&](size_t p, Range rows) { return factor.panels[p].slice(0, rows.begin, rows.end); };
  for (int64_t pass = 0; pass <= sweeps; ++pass)
    for (const Range& columns : refinement_slabs(panels_of(factor), group_width)) {
      const Slab slab(columns, slab_rows(panels_of(factor), columns, part).cuda(), factor, pass > 0);
      pass == 0 ? refiner.load(slab) : refiner.sweep(slab);
    }
  const double objective = refiner.objectives(kRowTile).sum().item<double>();
  return {refiner.take(), objective};
}

TEST_F(RowsOnDevice, RefineAsTheHostsSweeps) {
  expect_agrees_with_host(refine_on_device);
}
TEST_F(RowsOnDevice, DescendAndHelp) {
  expect_descent(refine_on_device);
}
TEST_F(RowsOnDevice, DoNotDependOnOthers) {
  expect_rows_do_not_depend_on_others(refine_on_device);
}

TEST_F(RowsOnDevice, AreCorrectedAsOnTheHost) {
  // Two substitutions in f32 behind a product of this width.
  constexpr double kTolerance = 1e-4;
  const Problem problem = random_problem(150, 432, 32);
  const at::Tensor c = 0.1 * random_problem(1, 432, 33).h;
  const Factor factor = factorize(problem.h, ridge_spec(1));
  const auto solution = [&](const at::Tensor& w, int64_t strip_rows) {
    CorrectedRows rows(w, strip_rows);
    rows.multiply(c, {0, 432});
    for (size_t p = factor.panels.size(); p-- > 0;) rows.substitute_back(factor.panels[p]);
    for (const at::Tensor& panel : factor.panels) rows.substitute_forward(panel, factor.curvature);
    return rows.take_solution().cpu();
  };
  const at::Tensor expected = solution(problem.w, kRowTile), found = solution(problem.w.cuda(), 2 * kRowTile);
  EXPECT_LT((found - expected).norm().item<double>(), kTolerance * expected.norm().item<double>());
}

}  // namespace isobath::quant
