#include <ATen/Context.h>

#include "quant/device_loop_cases.hpp"

namespace isobath::quant {

/// RowSolver on CUDA tensors; device_loop_on_host_test runs the same source on the host.
class RowSolverOnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no CUDA device on this machine";
  }
};

static std::pair<QuantizedMatrix, at::Tensor> solve(const at::Tensor& w, const Factor& factor,
                                                    const GridSpec& spec) {
  RowSolver solver(w.cuda(), factor, spec);
  for (const at::Tensor& panel : factor.panels) solver.advance(panel);
  const at::Tensor objectives = solver.objectives();
  QuantizedMatrix matrix = solver.take();
  matrix.codes = matrix.codes.cpu();
  matrix.scale = matrix.scale.cpu();
  matrix.zero = matrix.zero.cpu();
  return {matrix, objectives};
}

TEST_F(RowSolverOnDevice, AgreesWithTheHostsLoop) {
  expect_agrees_with_host(solve);
}
TEST_F(RowSolverOnDevice, FitsTheGridsOfTheHost) {
  expect_host_grids_without_feedback(solve);
  expect_host_grids_of_degenerate_groups(solve);
}
TEST_F(RowSolverOnDevice, RowsDoNotDependOnOthers) {
  expect_rows_do_not_depend_on_others(solve);
}

}  // namespace isobath::quant
