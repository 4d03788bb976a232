// The source of the device's kernels, run by the host (support/cuda_on_host).
#include <isobath/core/error.hpp>
#include <limits>

#include "quant/device_loop_cases.hpp"
#include "src/quant/device_loop.hpp"

namespace isobath::quant {

static std::pair<QuantizedMatrix, at::Tensor> solve(const at::Tensor& w, const Factor& factor,
                                                    const GridSpec& spec) {
  DeviceLoop loop(w, factor, spec, kRowTile);
  for (const at::Tensor& panel : factor.panels) loop.advance(panel);
  const at::Tensor objectives = loop.objectives();
  return {loop.take(), objectives};
}

TEST(DeviceLoopOnHost, AgreesWithTheHostsLoop) {
  expect_agrees_with_host(solve);
}

TEST(DeviceLoopOnHost, FitsTheGridsOfTheHost) {
  expect_host_grids_without_feedback(solve);
  expect_host_grids_of_degenerate_groups(solve);
}

TEST(DeviceLoopOnHost, RowsDoNotDependOnOthers) {
  expect_rows_do_not_depend_on_others(solve);
}

TEST(DeviceLoopOnHost, LeavesTheWeightsAloneAndDeadColumnsZero) {
  Problem problem = random_problem(1, 64, 24);
  problem.h[5].zero_();
  problem.h.select(1, 5).zero_();
  const at::Tensor before = problem.w.clone();

  const QuantizedMatrix found = solve(problem.w, factorize(problem.h, {}), {.bits = 4, .group = 16}).first;

  EXPECT_TRUE(at::equal(problem.w, before));
  EXPECT_EQ(dequantize(found).select(1, 5).count_nonzero().item<int64_t>(), 0);
}

TEST(DeviceLoopOnHost, NonFiniteWeightsAreAnErrorThatNamesThePlace) {
  at::Tensor w = at::zeros({4, 32});
  w[3][17] = std::numeric_limits<float>::infinity();
  try {
    (void)solve(w, factorize(at::eye(32), {}), {.group = 32});
    FAIL() << "expected NumericError";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("row 3, column 17"), std::string::npos) << error.what();
  }
}

}  // namespace isobath::quant
