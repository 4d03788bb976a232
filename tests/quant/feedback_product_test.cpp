#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "quant/problem.hpp"
#include "src/quant/feedback_product.hpp"

namespace isobath::quant {

/// Sums of n products in f32, in parts, against f64, relative to the root of n.
constexpr double kProductTolerance = 1e-6;

/// Columns of a panel [n_sources, n_columns], cut at `cut` into two parts that are packed on their own.
static FeedbackColumns packed(const at::Tensor& panel, int64_t cut) {
  FeedbackColumns columns(panel.size(0), panel.size(1));
  const auto* values = panel.const_data_ptr<float>();
  const Range sources{0, panel.size(0)};
  columns.pack(values, panel.size(1), sources, {0, cut});
  columns.pack(values + cut, panel.size(1), sources, {cut, panel.size(1)});
  return columns;
}

TEST(FeedbackProduct, AgreesWithAProductInF64) {
  auto generator = test_generator(31);
  const at::TensorOptions f32(at::kFloat);
  for (const int64_t n_sources : {0, 1, 255, 256, 700}) {
    for (const int64_t n_columns : {1, 6, 50, 128}) {
      for (const int64_t n_rows : {64, 256}) {
        SCOPED_TRACE(fmt::format("{} sources, {} columns, {} rows", n_sources, n_columns, n_rows));
        const at::Tensor panel = at::randn({n_sources, n_columns}, generator, f32),
                         errors = at::randn({n_sources, n_rows}, generator, f32);
        at::Tensor targets = at::randn({n_columns, n_rows}, generator, f32);
        const at::Tensor expected =
            targets.to(at::kDouble) + panel.t().to(at::kDouble).mm(errors.to(at::kDouble));

        packed(panel, n_columns / 3)
            .add_product(errors.const_data_ptr<float>(), n_rows, targets.mutable_data_ptr<float>());

        const double worst = (targets.to(at::kDouble) - expected).abs().max().item<double>();
        EXPECT_LE(worst, kProductTolerance * std::sqrt(static_cast<double>(n_sources + 1)) * 4);
      }
    }
  }
}

TEST(FeedbackProduct, RowsHaveTheSameBitsInAnyTile) {
  auto generator = test_generator(32);
  const at::TensorOptions f32(at::kFloat);
  const at::Tensor panel = at::randn({300, 128}, generator, f32),
                   errors = at::randn({300, 128}, generator, f32);
  const FeedbackColumns columns = packed(panel, 40);
  at::Tensor whole = at::zeros({128, 128}), half = at::zeros({128, 64});

  columns.add_product(errors.const_data_ptr<float>(), 128, whole.mutable_data_ptr<float>());
  const at::Tensor second = errors.slice(1, 64).contiguous();
  columns.add_product(second.const_data_ptr<float>(), 64, half.mutable_data_ptr<float>());

  EXPECT_TRUE(at::equal(whole.slice(1, 64), half));
}

}  // namespace isobath::quant
