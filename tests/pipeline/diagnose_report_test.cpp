#include "src/pipeline/diagnosis.hpp"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

// The numbers are worked out by hand from docs/method.md, "Diagnosis", and METHOD §7, in nats per token. T:
// all predicted tokens of the probe set; E: mean over the label draws, Σ over the sequences.
//
// first order: Σ s/T, labels of the data.
//
// second order: ½ Σ E[s²]/T, labels drawn from the model.
//
// objective: ½ Σ D‖ΔWx‖²/T.
//
// R: KL(ΔW)/(100 KL(ΔW/10)).
//
// off-diagonal: share of Σ_k C_lk, C = E[s sᵀ], that k ≠ l bring; none within twice its error over the draws.
//
// Warnings: R beyond 2 or below ½, n_eff/d below 1, cross-token mass beyond ½, off-diagonal beyond ½ either
// way; and, of the code alone, KL beyond twice the objective.
namespace isobath::pipeline {
namespace {

using model::Projection;
using nlohmann::json;

/// Every expected value is a fraction of small numbers; f64 sums of a few terms.
constexpr double kRounding = 1e-12;

at::Tensor table(std::vector<double> values, at::IntArrayRef shape) {
  return at::tensor(values, at::kDouble).reshape(shape);
}

const std::string kFirst = "model.layers.0.self_attn.o_proj";

/// Two linears that nothing is wrong with, in block 0 or one each in blocks 0 and 1; two sequences of 3 and 5
/// predicted tokens, two draws of each. All is measured: both linears, then the blocks.
Diagnosis two_linears(int64_t second_block = 0) {
  const DiagnosedPart first{.block = 0, .projections = {Projection::o}, .name = kFirst};
  const DiagnosedPart second{.block = second_block,
                             .projections = {Projection::down},
                             .name = fmt::format("model.layers.{}.mlp.down_proj", second_block)};
  Diagnosis d;
  d.modules = {first, second};
  d.measured = {first, second};
  d.module_of = {0, 1};
  for (int64_t block = 0; block <= second_block; ++block) {
    d.measured.push_back({.block = block, .projections = {}, .name = fmt::format("block {}", block)});
    d.module_of.push_back(-1);
  }
  d.n_tokens = table({3, 5}, {2});
  d.first_order = table({0.5, -1, 0.3, 0.2}, {2, 2});       // sums 0.8, −0.8
  d.fisher = table({1, 2, -1, -1, 2, 1, 0, 2}, {2, 2, 2});  // Σs² 6, 10; Σ s₀s₁ = 2 + 1 + 2 + 0
  d.weighted_change = table({2, 1, 4, 1}, {2, 2});          // sums 6, 2
  // KL, KL of a tenth, Δ loss of the first, the second and each block.
  const at::Tensor linears =
      table({1, 0.01, 0.5, 0.4, 0.006, -0.6, 3, 0.03, 0.3, 0.4, 0.002, 0.2}, {2, 2, 3});
  const at::Tensor blocks = table({2, 0.01, 0.25, 6, 0.03, 0.15}, {2, 1, 3});
  d.changes = at::cat({linears, blocks.expand({2, second_block + 1, 3})}, 1);
  d.cross_token_mass = {0.2, 0.3};
  d.effective_per_channel = {3.0, 4.0};
  return d;
}

/// The same with other draws, two of each sequence in turn.
Diagnosis with_draws(std::vector<double> first, std::vector<double> second) {
  Diagnosis d = two_linears();
  d.fisher = at::stack({table(std::move(first), {2, 2}), table(std::move(second), {2, 2})}, 2);
  return d;
}

json json_of(const Diagnosis& diagnosis) {
  return json::parse(report_of(diagnosis, {}).json);
}

/// Reasons but the first, which tells the share of the objective.
std::vector<std::string> warnings_of(const Diagnosis& diagnosis, const std::string& name) {
  const json report = json_of(diagnosis);
  for (const json& risk : report["at_risk"])
    if (risk["name"] == name) {
      auto reasons = risk["reasons"].get<std::vector<std::string>>();
      EXPECT_FALSE(reasons.empty());
      if (!reasons.empty()) reasons.erase(reasons.begin());
      return reasons;
    }
  ADD_FAILURE() << name << " is not named at risk";
  return {};
}

using Texts = std::vector<std::string>;

TEST(DiagnoseReport, PredictsAndMeasuresEachLinearPerToken) {
  const json report = json_of(two_linears());

  EXPECT_EQ(report["tokens"], 8);
  EXPECT_EQ(report["sequences"], 2);
  EXPECT_EQ(report["samples"], 2);
  ASSERT_EQ(report["modules"].size(), 2U);
  const json &first = report["modules"][0], &second = report["modules"][1];
  EXPECT_EQ(first["name"], kFirst);
  EXPECT_EQ(first["block"], 0);
  EXPECT_NEAR(first["predicted_first_order"], 0.1, kRounding);
  EXPECT_NEAR(second["predicted_first_order"], -0.1, kRounding);
  // ½ (1 + 1 + 4 + 0)/2 draws/8 tokens; ½ (4 + 1 + 1 + 4)/2/8.
  EXPECT_NEAR(first["predicted_second_order"], 6. / 32, kRounding);
  EXPECT_NEAR(second["predicted_second_order"], 10. / 32, kRounding);
  EXPECT_NEAR(first["predicted_objective"], 6. / 16, kRounding);
  EXPECT_NEAR(second["predicted_objective"], 2. / 16, kRounding);
  EXPECT_NEAR(first["kl"], 0.5, kRounding);
  EXPECT_NEAR(second["kl"], 0.1, kRounding);
  EXPECT_NEAR(first["nll_change"], 0.1, kRounding);
  EXPECT_NEAR(second["nll_change"], -0.05, kRounding);
  // 4/(100·0.04), 0.8/(100·0.008).
  EXPECT_NEAR(first["curvature_ratio"], 1, kRounding);
  EXPECT_NEAR(second["curvature_ratio"], 1, kRounding);
  EXPECT_EQ(first["cross_token_mass"], 0.2);
  EXPECT_EQ(second["effective_samples_per_channel"], 4);
}

TEST(DiagnoseReport, TheLinearsOfABlockMoveTogether) {
  const json report = json_of(two_linears());

  ASSERT_EQ(report["blocks"].size(), 1U);
  const json& block = report["blocks"][0];
  EXPECT_EQ(block["name"], "block 0");
  // s₀ + s₁ = 3, −2, 3, 2: ½·26/2/8, where each alone gives 16.
  EXPECT_NEAR(block["predicted_second_order"], 26. / 32, kRounding);
  EXPECT_NEAR(report["predicted_second_order_of_all"], 26. / 32, kRounding);
  EXPECT_NEAR(report["off_diagonal_share"], 10. / 26, kRounding);
  EXPECT_NEAR(block["predicted_first_order"], 0, kRounding);
  EXPECT_NEAR(block["predicted_objective"], 0.5, kRounding);
  EXPECT_NEAR(block["kl"], 1, kRounding);
  EXPECT_NEAR(block["nll_change"], 0.05, kRounding);
  EXPECT_NEAR(block["curvature_ratio"], 2, kRounding);
  EXPECT_TRUE(block["off_diagonal_share"].is_null());
  EXPECT_TRUE(block["cross_token_mass"].is_null());
}

TEST(DiagnoseReport, ABlockHoldsNoLinearOfAnother) {
  const json report = json_of(two_linears(1));

  ASSERT_EQ(report["blocks"].size(), 2U);
  const json &first = report["blocks"][0], &second = report["blocks"][1];
  EXPECT_NEAR(first["predicted_second_order"], 6. / 32, kRounding);
  EXPECT_NEAR(second["predicted_second_order"], 10. / 32, kRounding);
  EXPECT_NEAR(first["predicted_first_order"], 0.1, kRounding);
  EXPECT_NEAR(second["predicted_first_order"], -0.1, kRounding);
  EXPECT_NEAR(first["predicted_objective"], 6. / 16, kRounding);
  EXPECT_NEAR(second["predicted_objective"], 2. / 16, kRounding);
  // Coupling reaches from block to block.
  EXPECT_NEAR(report["off_diagonal_share"], 10. / 26, kRounding);
  EXPECT_NEAR(report["modules"][0]["off_diagonal_share"], 5. / 11, kRounding);
}

TEST(DiagnoseReport, ACurvatureRatioNeedsADivergenceOfTheTenth) {
  Diagnosis d = two_linears();
  d.changes.select(1, 0).select(1, kKlOfTenth).zero_();
  d.changes.select(1, 1).select(1, kKlOfTenth).fill_(0.001);

  const json report = json_of(d);

  EXPECT_TRUE(report["modules"][0]["curvature_ratio"].is_null());
  EXPECT_NEAR(report["modules"][1]["curvature_ratio"], 4, kRounding);  // 0.8/(100·0.002)
}

TEST(DiagnoseReport, AnOffDiagonalShareIsLeftOutWithinTwiceItsError) {
  const auto shares = [](const Diagnosis& d) {
    const json report = json_of(d);
    return std::pair(report["modules"][0]["off_diagonal_share"], report["modules"][1]["off_diagonal_share"]);
  };

  // Products 2, 1, 2, 0: sum 5, its error √(4·(9 − 25/4)/3) = 1.91, of which 5 is 2.6 times. Shares 5/(6 + 5)
  // and 5/(10 + 5).
  const auto told = shares(two_linears());
  EXPECT_NEAR(told.first, 5. / 11, kRounding);
  EXPECT_NEAR(told.second, 5. / 15, kRounding);

  // Products 2, 0, 1, 0: sum 3, the same error, 1.6 times.
  const auto left_out = shares(with_draws({1, -1, 1, 0}, {2, 0, 1, 2}));
  EXPECT_TRUE(left_out.first.is_null());
  EXPECT_TRUE(left_out.second.is_null());
  // Of −5 as of 5.
  EXPECT_NEAR(shares(with_draws({-2, -2, -2, 2}, {1, 0.5, 1, 0})).first, -5. / 11, kRounding);

  // One draw has no error.
  Diagnosis single = two_linears();
  single.fisher = table({1, 2}, {1, 1, 2});
  EXPECT_TRUE(shares(single).first.is_null());
}

TEST(DiagnoseReport, NamesThoseOfTheLargestObjectiveAtRisk) {
  const json report = json_of(two_linears());

  ASSERT_EQ(report["at_risk"].size(), 2U);
  EXPECT_EQ(report["at_risk"][0]["name"], kFirst);
  EXPECT_EQ(report["at_risk"][0]["reasons"], (Texts{"75.0 % of the solver's objective"}));
  EXPECT_EQ(report["at_risk"][1]["reasons"], (Texts{"25.0 % of the solver's objective"}));
}

TEST(DiagnoseReport, WarnsOutsideTheQuadraticZone) {
  Diagnosis d = two_linears();
  const auto warnings_at = [&](double tenth) {
    d.changes.select(1, 0).select(1, kKlOfTenth).fill_(tenth / 2);
    return warnings_of(d, kFirst);
  };

  // KL sums to 4.
  EXPECT_EQ(warnings_at(0.04 / 2.1), Texts{"outside the quadratic zone (curvature ratio 2.10)"});
  EXPECT_EQ(warnings_at(0.04 / 1.9), Texts{});
  EXPECT_EQ(warnings_at(0.04 / 0.52), Texts{});
  EXPECT_EQ(warnings_at(0.04 / 0.48), Texts{"outside the quadratic zone (curvature ratio 0.48)"});
}

TEST(DiagnoseReport, WarnsOfFewSamplesAndOfTokensThatActTogether) {
  Diagnosis d = two_linears();
  d.effective_per_channel[0] = 0.98;
  EXPECT_EQ(warnings_of(d, kFirst), Texts{"few tokens decide its H (n_eff/d 0.98): more damping or tokens"});
  d.effective_per_channel[0] = 1.02;
  EXPECT_EQ(warnings_of(d, kFirst), Texts{});

  d.cross_token_mass[0] = 0.52;
  EXPECT_EQ(warnings_of(d, kFirst),
            Texts{"tokens act together (cross-token mass 0.52), which D does not see"});
  d.cross_token_mass[0] = 0.48;
  EXPECT_EQ(warnings_of(d, kFirst), Texts{});

  d.cross_token_mass[0] = d.effective_per_channel[0] = std::nullopt;
  EXPECT_EQ(warnings_of(d, kFirst), Texts{});
}

TEST(DiagnoseReport, WarnsOfErrorsThatAddUpOrCancel) {
  // Equal products: no error. 3/(4 + 3), 5/(4 + 5).
  EXPECT_EQ(warnings_of(with_draws({1, 1, 1, 1}, {0.75, 0.75, 0.75, 0.75}), kFirst), Texts{});
  EXPECT_EQ(warnings_of(with_draws({1, 1, 1, 1}, {1.25, 1.25, 1.25, 1.25}), kFirst),
            Texts{"errors of other linears add to it (off-diagonal share 0.56)"});
  // −1/(4 − 1), −1.5/(4 − 1.5).
  EXPECT_EQ(warnings_of(with_draws({1, 1, 1, 1}, {-0.25, -0.25, -0.25, -0.25}), kFirst), Texts{});
  EXPECT_EQ(warnings_of(with_draws({1, 1, 1, 1}, {-0.375, -0.375, -0.375, -0.375}), kFirst),
            Texts{"errors of other linears cancel it (off-diagonal share -0.60)"});
  // More than all of it: −1.5/(0.5625 − 1.5).
  EXPECT_EQ(
      warnings_of(with_draws({1, 1, 1, 1}, {-0.375, -0.375, -0.375, -0.375}), "model.layers.0.mlp.down_proj"),
      Texts{"errors of other linears cancel it (off-diagonal share 1.60)"});
}

TEST(DiagnoseReport, WarnsOfMoreThanTwiceThePrediction) {
  Diagnosis d = two_linears();
  // KL 0.5; objective 3.8/16 and 4.2/16.
  d.weighted_change.select(1, 0).fill_(1.9);
  EXPECT_EQ(warnings_of(d, kFirst), Texts{"measured 2.1 times the prediction"});
  d.weighted_change.select(1, 0).fill_(2.1);
  EXPECT_EQ(warnings_of(d, kFirst), Texts{});
}

TEST(DiagnoseReport, TellsHowPredictionsOrderWhatWasMeasured) {
  const json report = json_of(two_linears());

  // KL 0.5 > 0.1; ½E[s²] 6 < 10; objective 6 > 2. The ten worst of two are both.
  const json& linears = report["agreement"];
  EXPECT_EQ(linears["parts"], 2);
  EXPECT_NEAR(linears["rank_correlation_second_order"], -1, kRounding);
  EXPECT_NEAR(linears["rank_correlation_objective"], 1, kRounding);
  EXPECT_EQ(linears["precision_at_10_second_order"], 1);
  EXPECT_EQ(linears["precision_at_10_objective"], 1);
  EXPECT_NEAR(linears["predicted_over_measured"], 0.5 / 0.6, kRounding);
  const json& blocks = report["agreement_of_blocks"];
  EXPECT_EQ(blocks["parts"], 1);
  EXPECT_EQ(blocks["rank_correlation_second_order"], 0);
  EXPECT_NEAR(blocks["predicted_over_measured"], 26. / 32, kRounding);
}

/// Twelve linears of block 0 with one draw of one token. Linear i: objective i + 1, s = 12 − i, KL i + 1 but
/// of the first 13.
Diagnosis twelve_linears() {
  constexpr int64_t kLinears = 12;
  Diagnosis d;
  const at::Tensor place = at::arange(kLinears, at::kDouble);
  for (int64_t i = 0; i < kLinears; ++i) {
    d.modules.push_back({.block = 0, .projections = {}, .name = fmt::format("linear {}", i)});
    d.module_of.push_back(i);
  }
  d.measured = d.modules;
  d.n_tokens = at::ones({1}, at::kDouble);
  d.first_order = at::zeros({1, kLinears}, at::kDouble);
  d.fisher = (kLinears - place).reshape({1, 1, kLinears});
  d.weighted_change = 2 * (place + 1).unsqueeze(0);
  d.changes = at::zeros({1, kLinears, kMeasuredColumns}, at::kDouble);
  d.changes.select(2, kKl).copy_(place + 1);
  d.changes[0][0][kKl] = 13;
  d.cross_token_mass.resize(kLinears);
  d.effective_per_channel.resize(kLinears);
  return d;
}

TEST(DiagnoseReport, PrecisionCountsTheTenWorstThatTheTenLargestPredictionsName) {
  const json report = json_of(twelve_linears());

  // Worst: 0, 3 … 11. By the objective 2 … 11, nine of them; by s 0 … 9, eight of them.
  EXPECT_NEAR(report["agreement"]["precision_at_10_objective"], 0.9, kRounding);
  EXPECT_NEAR(report["agreement"]["precision_at_10_second_order"], 0.8, kRounding);
  // Spearman's 1 − 6Σd²/(12·143): Σd² = 11² + 11·1², and 2·(10² + 8² + 6² + 4² + 2²).
  EXPECT_NEAR(report["agreement"]["rank_correlation_objective"], 7. / 13, kRounding);
  EXPECT_NEAR(report["agreement"]["rank_correlation_second_order"], -7. / 13, kRounding);
  ASSERT_EQ(report["at_risk"].size(), 10U);
  EXPECT_EQ(report["at_risk"][0]["name"], "linear 11");
  EXPECT_EQ(report["at_risk"][9]["name"], "linear 2");
}

TEST(DiagnoseReport, LinearsThatWereNotMeasuredHaveNoMeasurements) {
  Diagnosis d = two_linears();
  d.measured.erase(d.measured.begin());
  d.module_of.erase(d.module_of.begin());
  d.changes = d.changes.slice(1, 1);
  const json some = json_of(d);
  EXPECT_TRUE(some["modules"][0]["kl"].is_null());
  EXPECT_TRUE(some["modules"][0]["curvature_ratio"].is_null());
  EXPECT_NEAR(some["modules"][1]["kl"], 0.1, kRounding);
  EXPECT_EQ(some["agreement"]["parts"], 1);

  d.measured.erase(d.measured.begin());
  d.module_of.erase(d.module_of.begin());
  d.changes = d.changes.slice(1, 1);
  const json none = json_of(d);
  EXPECT_FALSE(none.contains("agreement"));
  EXPECT_NEAR(none["blocks"][0]["kl"], 1, kRounding);
}

TEST(DiagnoseReport, TheTableBeginsWithTheWorstMeasured) {
  const auto begins_of = [](const std::string& text) {
    Texts lines;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) lines.push_back(line.substr(0, line.find(' ')));
    return lines;
  };

  DiagnoseRequest request;
  request.rows = 1;

  const Texts one = begins_of(report_of(two_linears(), request).table);
  ASSERT_GE(one.size(), 4U);
  EXPECT_EQ(one[0], "worst");
  EXPECT_EQ(one[2], kFirst);  // below the rule; ½E[s²] is the other's
  EXPECT_EQ(one[3], "block");

  // Without measurements of linears, the largest ½E[s²].
  Diagnosis d = two_linears();
  d.measured.erase(d.measured.begin(), d.measured.begin() + 2);
  d.module_of.erase(d.module_of.begin(), d.module_of.begin() + 2);
  d.changes = d.changes.slice(1, 2);
  const std::string text = report_of(d, request).table;
  EXPECT_EQ(begins_of(text)[2], "model.layers.0.mlp.down_proj");
  EXPECT_EQ(text.find("linears measured"), std::string::npos);
  EXPECT_NE(text.find("1 blocks measured"), std::string::npos);
}

}  // namespace
}  // namespace isobath::pipeline
