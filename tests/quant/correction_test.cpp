#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/quant/correction.hpp>
#include <isobath/quant/reference.hpp>
#include <isobath/quant/solver.hpp>

#include "quant/problem.hpp"

namespace isobath::quant {

/// H, C and M are f32; the least-squares problem is solved in f64 from the inputs.
constexpr double kTolerance = 1e-4;
constexpr int64_t kTokens = 200, kColumns = 24, kRows = 7;

/// Inputs of a linear in the original model and behind a quantized prefix, with token weights.
struct Streams {
  at::Tensor x_original, x, d, w, h, c;
};

static Streams random_streams(uint64_t seed) {
  auto generator = test_generator(seed);
  const auto f64 = at::TensorOptions(at::kDouble);
  const at::Tensor mix = at::eye(kColumns, f64) + 0.3 * at::randn({kColumns, kColumns}, generator, f64);
  Streams s;
  s.x_original = at::randn({kTokens, kColumns}, generator, f64).mm(mix);
  s.x = s.x_original + 0.2 * at::randn({kTokens, kColumns}, generator, f64).mm(mix);
  s.d = at::rand({kTokens}, generator, f64);
  s.w = at::randn({kRows, kColumns}, generator, f64).to(at::kFloat);
  const at::Tensor weighted = s.x * s.d.unsqueeze(1);
  s.h = s.x.t().mm(weighted).to(at::kFloat);
  s.c = (s.x_original - s.x).t().mm(weighted).to(at::kFloat);
  return s;
}

static double output_error(const Streams& s, const at::Tensor& w_hat) {
  const at::Tensor error = s.x_original.mm(s.w.to(at::kDouble).t()) - s.x.mm(w_hat.to(at::kDouble).t());
  return 0.5 * (s.d.unsqueeze(1) * error.square()).sum().item<double>();
}

/// Panels of C, and of the ridge factor back and forth.
static at::Tensor qep_solution(const at::Tensor& w, const at::Tensor& c, const at::Tensor& h, double ridge,
                               int64_t width = 10, int64_t strip_rows = kRowTile) {
  FactorSpec spec = ridge_spec(ridge);
  spec.panel_width = width;
  const Factor factor = factorize(h, spec);
  check_ridge(factor);
  CorrectedRows rows(w, strip_rows);
  for (const Range& columns : column_panels(h.size(0), width))
    rows.multiply(c.slice(1, columns.begin, columns.end), columns);
  for (size_t p = factor.panels.size(); p-- > 0;) rows.substitute_back(factor.panels[p]);
  for (const at::Tensor& panel : factor.panels) rows.substitute_forward(panel, factor.curvature);
  return rows.take_solution();
}
static at::Tensor qep_target(const Streams& s, double ridge, double strength = 1) {
  return s.w + strength * qep_solution(s.w, s.c, s.h, ridge);
}

TEST(Correction, QepIsTheRidgeSolutionOfTheAsymmetricObjective) {
  const Streams s = random_streams(31);
  for (const double share : {1e-6, 0.1, 1.0}) {
    const at::Tensor target = qep_target(s, share);

    const double ridge = share * s.h.diagonal().mean().item<double>();
    const at::Tensor expected = reference::least_squares_target(s.w, s.x_original, s.x, s.d, ridge);
    EXPECT_TRUE(at::allclose(target.to(at::kDouble), expected, kTolerance, kTolerance)) << share;
  }
}

TEST(Correction, WithTheResidualStreamItIsTheRidgeSolutionForTheSum) {
  const Streams s = random_streams(41);
  auto generator = test_generator(42);
  // The residual has more channels than this part of a module has rows: some of them, in another order.
  constexpr int64_t kChannels = kRows + 4;
  const at::Tensor residual = at::randn({kTokens, kChannels}, generator, at::TensorOptions(at::kDouble));
  const at::Tensor rows = at::tensor({9, 2, 0, 10, 5, 4, 7}, at::kLong);
  const at::Tensor p = residual.t().mm(s.x * s.d.unsqueeze(1)).to(at::kFloat);
  constexpr double kShare = 0.7, kRidge = 0.1;

  FactorSpec spec = ridge_spec(kRidge);
  const Factor factor = factorize(s.h, spec);
  CorrectedRows corrected_rows(s.w);
  corrected_rows.add_residual(rows, kShare);
  const at::Tensor both = at::cat({s.c, p});
  for (const Range& columns : column_panels(kColumns, 10))
    corrected_rows.multiply(both.slice(1, columns.begin, columns.end), columns);
  const at::Tensor products = corrected_rows.products({0, kRows});
  for (size_t panel = factor.panels.size(); panel-- > 0;)
    corrected_rows.substitute_back(factor.panels[panel]);
  for (const at::Tensor& panel : factor.panels) corrected_rows.substitute_forward(panel, factor.curvature);

  const at::Tensor own = kShare * residual.index_select(1, rows);
  const at::Tensor expected = reference::least_squares_target(
      s.w, s.x_original, s.x, s.d, kRidge * s.h.diagonal().mean().item<double>(), own);
  EXPECT_TRUE(
      at::allclose((s.w + corrected_rows.take_solution()).to(at::kDouble), expected, kTolerance, kTolerance));
  // W C + ρP by hand, and as the linear part of the objective.
  EXPECT_TRUE(at::allclose(products, s.w.mm(s.c) + kShare * p.index_select(0, rows), kTolerance, kTolerance));
}

TEST(Correction, StrengthIsAShareOfTheWay) {
  const Streams s = random_streams(32);
  EXPECT_LT(output_error(s, qep_target(s, 1e-6, 0.5)), output_error(s, s.w));
  EXPECT_LT(output_error(s, qep_target(s, 1e-6)), output_error(s, qep_target(s, 1e-6, 0.5)));
  const at::Tensor m = gptaq_correction(s.c, factorize(s.h, {}));
  EXPECT_TRUE(at::equal(corrected(s.w, m, 0), s.w));
}

TEST(Correction, GptaqLetsLaterColumnsMakeUpForEachEarlierOne) {
  const Streams s = random_streams(33);
  constexpr double kSmallDamping = 1e-7;  // the factor's; the literal form has none
  for (const auto act_order : {ActOrder::none, ActOrder::static_groups}) {
    const Factor factor = factorize(s.h, {.damping = kSmallDamping, .act_order = act_order});

    const at::Tensor target = corrected(s.w, gptaq_correction(s.c, factor), 1);

    const auto ordered = [&](const at::Tensor& t) {
      return t.index_select(0, factor.order).index_select(1, factor.order);
    };
    const at::Tensor expected =
        reference::gptaq_target(s.w.index_select(1, factor.order), ordered(s.c), ordered(s.h));
    EXPECT_TRUE(
        at::allclose(target.index_select(1, factor.order).to(at::kDouble), expected, kTolerance, kTolerance));
    EXPECT_LT(output_error(s, target), output_error(s, s.w));
  }
}

TEST(Correction, AsymmetricObjectiveIsTheChangeOfTheOutputError) {
  const Streams s = random_streams(34);
  auto generator = test_generator(35);
  const at::Tensor w_hat = s.w + 0.1 * at::randn({kRows, kColumns}, generator, at::TensorOptions(at::kFloat));

  const double change = output_error(s, w_hat) - output_error(s, s.w);

  CorrectedRows rows(s.w);
  rows.multiply(s.c, {0, kColumns});
  const at::Tensor difference = w_hat - s.w;
  EXPECT_NEAR(
      asymmetric_objective(objective(s.w, w_hat, s.h), difference, rows.products({0, kRows})) / change, 1,
      kTolerance);
}

TEST(Correction, QuantizedTowardsTheCorrectedTargetTheOutputIsNearerToTheOriginal) {
  const Streams s = random_streams(36);
  const Factor factor = factorize(s.h, {});
  const GridSpec spec{.bits = 4, .group = 0};
  const double plain = output_error(s, dequantize(gptq(s.w, factor, spec)));

  for (const at::Tensor& target : {qep_target(s, 0.01), corrected(s.w, gptaq_correction(s.c, factor), 1)})
    EXPECT_LT(output_error(s, dequantize(gptq(target, factor, spec))), plain);
}

TEST(Correction, NothingIsCorrectedWhereNothingDeviatesOrNothingIsSeen) {
  const Streams s = random_streams(37);
  EXPECT_EQ(qep_solution(s.w, at::zeros_like(s.c), s.h, 1).count_nonzero().item<int64_t>(), 0);
  EXPECT_EQ(gptaq_correction(at::zeros_like(s.c), factorize(s.h, {})).count_nonzero().item<int64_t>(), 0);
}

TEST(Correction, DeadColumnsAreNotCorrected) {
  Streams s = random_streams(38);
  s.x.select(1, 5).zero_();
  const at::Tensor weighted = s.x * s.d.unsqueeze(1);
  s.h = s.x.t().mm(weighted).to(at::kFloat);
  s.c = (s.x_original - s.x).t().mm(weighted).to(at::kFloat);

  for (const at::Tensor& m : {qep_solution(s.w, s.c, s.h, 0.1), gptaq_correction(s.c, factorize(s.h, {}))})
    EXPECT_EQ(m.select(1, 5).count_nonzero().item<int64_t>(), 0);
}

TEST(Correction, RowsHaveTheSameBitsInAnyStripsAndPanelsAgree) {
  auto generator = test_generator(39);
  const Problem problem = random_problem(150, 96, 40);
  const at::Tensor c = 0.1 * problem.h.mm(at::randn({96, 96}, generator)) / 10;
  const at::Tensor whole = qep_solution(problem.w, c, problem.h, 0.1, 32);
  for (const int64_t part : {kRowTile, int64_t{37}}) {
    std::vector<at::Tensor> parts;
    for (const at::Tensor& rows : problem.w.split(part))
      parts.push_back(qep_solution(rows.contiguous(), c, problem.h, 0.1, 32));
    EXPECT_TRUE(at::equal(at::cat(parts), whole)) << part;
  }
  for (const auto& [width, strip_rows] : {std::pair{int64_t{96}, kRowTile}, {32, 2 * kRowTile}})
    EXPECT_TRUE(at::allclose(qep_solution(problem.w, c, problem.h, 0.1, width, strip_rows), whole, kTolerance,
                             kTolerance * whole.abs().max().item<double>()));
}

}  // namespace isobath::quant
