#pragma once
#include <isobath/quant/refine.hpp>

#include "quant/device_cases.hpp"

/// What the refinement of a device must have in common with the host's.
namespace isobath::quant {

/// Errors are carried through the sweeps in f32, and λ‖ΔW‖² is subtracted.
constexpr double kObjectiveTolerance = 1e-4;
/// Moves are judged in f32, the objective is taken in f64.
constexpr double kRoundingSlack = 1 + 1e-6;

struct RefinedMatrix {
  QuantizedMatrix matrix;  ///< on the CPU
  double objective;        ///< undamped, from the errors that were carried along
};

inline std::vector<DeviceCase> refine_cases() {
  constexpr auto kStatic = ActOrder::static_groups;
  return {{{.bits = 3, .group = 32}},
          {{.bits = 2, .group = 64, .symmetric = false}, ActOrder::none, 96},
          {{.bits = 4, .group = 48, .storage = at::kHalf}, ActOrder::none, 48},
          {{.bits = 8, .group = 144, .storage = at::kFloat}, ActOrder::none, 96},  // ends within a panel
          {{.bits = 3, .group = 144, .symmetric = false}},
          {{.bits = 4, .group = 0}},
          {{.bits = 3, .group = 32}, kStatic},
          {{.bits = 2, .group = 144, .symmetric = false}, kStatic, 96}};
}

/// A problem with a dead column.
inline Problem refined_problem(int64_t n_rows, int64_t n_columns) {
  Problem problem = random_problem(n_rows, n_columns, 31);
  problem.h[5].zero_();
  problem.h.select(1, 5).zero_();
  return problem;
}

/// refine(start, target, factor, sweeps) -> RefinedMatrix.
template <class Refine>
void expect_agrees_with_host(const Refine& refine_there) {
  const Problem problem = refined_problem(40, 576);
  for (const DeviceCase& c : refine_cases()) {
    SCOPED_TRACE(name_of(c));
    const Factor factor = factorize(problem.h, {.act_order = c.act_order, .panel_width = c.panel_width});
    const QuantizedMatrix start = gptq(problem.w, factor, c.spec);
    const QuantizedMatrix host = refine(start, problem.w, factor, 2);

    const RefinedMatrix found = refine_there(start, problem.w, factor, 2);

    expect_most_rows_equal(found.matrix, host, kMovedScaleTolerance);
    const double reached = objective(problem.w, dequantize(found.matrix), problem.h);
    EXPECT_NEAR(reached / objective(problem.w, dequantize(host), problem.h), 1, kTotalObjectiveTolerance);
    EXPECT_NEAR(found.objective / reached, 1, kObjectiveTolerance);
    EXPECT_EQ(dequantize(found.matrix).select(1, 5).count_nonzero().template item<int64_t>(), 0)
        << "a dead column";
  }
}

template <class Refine>
void expect_descent(const Refine& refine_there) {
  const Problem problem = refined_problem(40, 192);
  const Factor factor = factorize(problem.h, {});
  // What is descended has the factor's damping.
  at::Tensor damped = problem.h.to(at::kDouble).clone();
  damped.diagonal().add_(factor.damping * factor.mean);
  for (const GridSpec& spec :
       {GridSpec{.bits = 3, .group = 32}, GridSpec{.bits = 2, .group = 64, .symmetric = false}}) {
    const QuantizedMatrix start = gptq(problem.w, factor, spec);
    const auto reached = [&](const QuantizedMatrix& matrix) {
      return objective(problem.w.index_fill(1, at::tensor({5}, at::kLong), 0), dequantize(matrix), damped);
    };
    const double first = reached(start);
    double before = first;
    for (const int64_t sweeps : {1, 2, 4}) {
      const double now = reached(refine_there(start, problem.w, factor, sweeps).matrix);
      EXPECT_LE(now, kRoundingSlack * before) << sweeps;
      before = now;
    }
    EXPECT_LT(before, 0.99 * first) << "the sweeps help";
  }
}

template <class Refine>
void expect_rows_do_not_depend_on_others(const Refine& refine_there) {
  const Problem problem = refined_problem(70, 288);
  for (const GridSpec& spec :
       {GridSpec{.bits = 3, .group = 32}, GridSpec{.bits = 2, .group = 96, .symmetric = false}}) {
    const Factor factor = factorize(problem.h, {});
    const QuantizedMatrix start = gptq(problem.w, factor, spec);
    const QuantizedMatrix whole = refine_there(start, problem.w, factor, 2).matrix;
    expect_parts_are_the_whole(whole, [&](int64_t begin, int64_t end) {
      const QuantizedMatrix rows{spec, start.codes.slice(0, begin, end), start.scale.slice(0, begin, end),
                                 start.zero.slice(0, begin, end)};
      return refine_there(rows, problem.w.slice(0, begin, end), factor, 2).matrix;
    });
  }
}

}  // namespace isobath::quant
