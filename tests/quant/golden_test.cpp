#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/io/safetensors_reader.hpp>
#include <isobath/quant/solver.hpp>

namespace isobath::quant {

/// Distance to a rounding boundary, in steps, below which f32 may decide otherwise than f64.
constexpr double kTieMargin = 1e-3;
constexpr double kObjectiveTolerance = 1e-5;
constexpr double kObjectiveToleranceWithTies = 1e-2;

/// Golden: tests/data/make_gptq_golden.py (f64 numpy, independent of this code).
TEST(Gptq, AgreesWithAnIndependentTranscriptionInPython) {
  const io::SafetensorsReader golden(ISOBATH_TEST_DATA "/gptq_golden.safetensors");
  const at::Tensor w = golden.read("weight"), h = golden.read("hessian");
  int n_cases = 0, n_exact = 0;
  for (const auto& [key, info] : golden.tensors()) {
    if (!key.ends_with(".codes")) continue;
    const std::string name = key.substr(0, key.size() - 6);
    SCOPED_TRACE(name);
    int bits = 0, group = 0;
    ASSERT_EQ(std::sscanf(name.c_str(), "b%d_g%d_", &bits, &group), 2);
    const bool symmetric = name.find("_sym_") != std::string::npos, ordered = name.ends_with("_act");
    const Factor factor = factorize(h, {.act_order = ordered ? ActOrder::static_groups : ActOrder::none});
    const QuantizedMatrix matrix =
        gptq(w, factor, {.bits = bits, .group = group, .symmetric = symmetric, .clip_search = false});

    const at::Tensor order = golden.read(name + ".order");
    EXPECT_TRUE(at::equal(factor.order, order));
    const at::Tensor differs = (matrix.codes != golden.read(key)).index_select(1, order);
    const at::Tensor is_close = golden.read(name + ".margin").to(at::kDouble) < kTieMargin;
    // Where a row first differs, f64 must have been at a tie; what follows in that row compensates another
    // error.
    bool any = false;
    for (int64_t row = 0; row < w.size(0); ++row) {
      const at::Tensor at = differs[row].nonzero();
      if (at.size(0) == 0) continue;
      any = true;
      EXPECT_TRUE(is_close[row][at[0].item<int64_t>()].item<bool>())
          << "row " << row << " position " << at[0].item<int64_t>();
    }
    if (!any) {
      EXPECT_TRUE(at::equal(matrix.scale.to(at::kFloat), golden.read(name + ".scale")));
      EXPECT_TRUE(at::equal(matrix.zero, golden.read(name + ".zero")));
    }
    const double expected = golden.read(name + ".objective").item<double>();
    EXPECT_NEAR(objective(w, dequantize(matrix), h) / expected, 1,
                any ? kObjectiveToleranceWithTies : kObjectiveTolerance);
    ++n_cases;
    n_exact += !any;
  }
  EXPECT_EQ(n_cases, 20);
  EXPECT_GE(n_exact, 15);
}

}  // namespace isobath::quant
