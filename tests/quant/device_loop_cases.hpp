#pragma once
#include "quant/device_cases.hpp"

/// What the column loop of a device must have in common with the host's.
namespace isobath::quant {

/// f32 parts against a product with H in f32.
constexpr double kFreeObjectiveTolerance = 1e-4;
/// Without feedback a row is the fit of its grids alone.
constexpr double kMinGridsEqual = 0.98;

inline std::vector<DeviceCase> loop_cases() {
  constexpr auto kStatic = ActOrder::static_groups;
  return {{{.bits = 3, .group = 32}},
          {{.bits = 2, .group = 64, .symmetric = false}, ActOrder::none, 100},
          {{.bits = 4, .group = 48, .storage = at::kHalf}, ActOrder::none, 50},
          {{.bits = 4, .group = 96, .symmetric = false, .clip_search = false}},
          {{.bits = 8, .group = 192, .storage = at::kFloat}, ActOrder::none, 200},  // two blocks a group
          {{.bits = 3, .group = 144, .symmetric = false}},
          {{.bits = 4, .group = 0}},
          {{.bits = 3, .group = 32}, kStatic},
          {{.bits = 2, .group = 144, .symmetric = false}, kStatic, 100}};
}

/// solve(w, factor, spec) -> codes and objectives [tiles of kRowTile] of the device's loop, on the CPU.
template <class Solve>
void expect_agrees_with_host(const Solve& solve) {
  const Problem problem = random_problem(70, 576, 21);
  for (const DeviceCase& c : loop_cases()) {
    SCOPED_TRACE(name_of(c));
    const Factor factor = factorize(problem.h, {.act_order = c.act_order, .panel_width = c.panel_width});
    const QuantizedMatrix host = gptq(problem.w, factor, c.spec);

    const auto [found, objectives] = solve(problem.w, factor, c.spec);

    expect_most_rows_equal(found, host, kScaleTolerance);
    const double reached = objective(problem.w, dequantize(found), problem.h);
    EXPECT_NEAR(reached / objective(problem.w, dequantize(host), problem.h), 1, kTotalObjectiveTolerance);
    EXPECT_EQ(objectives.size(0), 2);
    EXPECT_NEAR(objectives.sum().template item<double>() / reached, 1, kFreeObjectiveTolerance);
  }
}

template <class Solve>
void expect_host_grids_without_feedback(const Solve& solve) {
  const Problem problem = random_problem(64, 192, 22);
  const Factor factor = factorize(at::diag(problem.h.diagonal()), {});
  for (const auto storage : {at::kBFloat16, at::kHalf, at::kFloat})
    for (const int bits : {2, 3, 4, 5, 8})
      for (const bool symmetric : {true, false}) {
        const GridSpec spec{.bits = bits, .group = 64, .symmetric = symmetric, .storage = storage};
        const QuantizedMatrix host = gptq(problem.w, factor, spec);
        const QuantizedMatrix found = solve(problem.w, factor, spec).first;
        const at::Tensor equal = (found.scale == host.scale) & (found.zero == host.zero);
        EXPECT_GE(equal.to(at::kDouble).mean().template item<double>(), kMinGridsEqual) << bits << symmetric;
        EXPECT_NEAR(objective(problem.w, dequantize(found), problem.h) /
                        objective(problem.w, dequantize(host), problem.h),
                    1, kTotalObjectiveTolerance);
      }
}

/// Groups for which nothing is searched.
template <class Solve>
void expect_host_grids_of_degenerate_groups(const Solve& solve) {
  at::Tensor w = at::zeros({4, 32});
  w[1].fill_(1e-20F);
  w[2].fill_(-6.5e4F);
  w[3][5] = 0.75F;
  const Factor factor = factorize(at::eye(32), {});
  for (const auto storage : {at::kBFloat16, at::kHalf, at::kFloat})
    for (const bool symmetric : {true, false}) {
      const GridSpec spec{.bits = 2, .group = 16, .symmetric = symmetric, .storage = storage};
      const QuantizedMatrix host = gptq(w, factor, spec);
      const QuantizedMatrix found = solve(w, factor, spec).first;
      EXPECT_TRUE(at::equal(found.scale, host.scale)) << symmetric;
      EXPECT_TRUE(at::equal(found.zero, host.zero)) << symmetric;
      EXPECT_TRUE(at::equal(found.codes, host.codes)) << symmetric;
    }
}

template <class Solve>
void expect_rows_do_not_depend_on_others(const Solve& solve) {
  const Problem problem = random_problem(70, 320, 23);
  for (const auto act_order : {ActOrder::none, ActOrder::static_groups}) {
    const Factor factor = factorize(problem.h, {.act_order = act_order});
    for (const GridSpec& spec :
         {GridSpec{.bits = 3, .group = 64}, GridSpec{.bits = 2, .group = 160, .symmetric = false}}) {
      const QuantizedMatrix whole = solve(problem.w, factor, spec).first;
      expect_parts_are_the_whole(whole, [&](int64_t begin, int64_t end) {
        return solve(problem.w.slice(0, begin, end), factor, spec).first;
      });
    }
  }
}

}  // namespace isobath::quant
