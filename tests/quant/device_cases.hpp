#pragma once
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <isobath/quant/solver.hpp>

#include "quant/problem.hpp"

/// What the comparisons of a device's codes with the host's share.
namespace isobath::quant {

/// A code at a tie, a move, or two grids of almost equal error, may flip where f32 sums are rounded
/// differently; its whole row then differs.
constexpr double kMinRowsEqual = 0.9;
constexpr double kTotalObjectiveTolerance = 5e-3;
/// Equal in bf16 and f16; scales that are stored in f32 keep the rounding of their sums, of those that sweeps
/// have moved by that of carried errors, too.
constexpr double kScaleTolerance = 1e-6, kMovedScaleTolerance = 1e-5;

struct DeviceCase {
  GridSpec spec;
  ActOrder act_order = ActOrder::none;
  int64_t panel_width = kPanel;
};

inline std::string name_of(const DeviceCase& c) {
  return fmt::format("{} bits, group {}, symmetric {}, clip {}, {}, act-order {}, panels {}", c.spec.bits,
                     c.spec.group, c.spec.symmetric, c.spec.clip_search, c10::toString(c.spec.storage),
                     c.act_order != ActOrder::none, c.panel_width);
}

inline void expect_most_rows_equal(const QuantizedMatrix& found, const QuantizedMatrix& host,
                                   double scale_tolerance) {
  const at::Tensor equal = (found.codes == host.codes).all(1) &
                           at::isclose(found.scale, host.scale, scale_tolerance, 0).all(1) &
                           (found.zero == host.zero).all(1);
  EXPECT_GE(equal.to(at::kDouble).mean().item<double>(), kMinRowsEqual);
}

/// part(begin, end): codes of these rows alone.
template <class Part>
void expect_parts_are_the_whole(const QuantizedMatrix& whole, const Part& part) {
  constexpr int64_t kFirstRows = 33;
  const QuantizedMatrix first = part(0, kFirstRows), second = part(kFirstRows, whole.codes.size(0));
  EXPECT_TRUE(at::equal(at::cat({first.codes, second.codes}), whole.codes));
  EXPECT_TRUE(at::equal(at::cat({first.scale, second.scale}), whole.scale));
  EXPECT_TRUE(at::equal(at::cat({first.zero, second.zero}), whole.zero));
}

}  // namespace isobath::quant
