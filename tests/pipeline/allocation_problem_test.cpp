#include "src/pipeline/allocation_problem.hpp"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <limits>

#include "model/scratch_directory.hpp"
#include "plan/tiny.hpp"

// The numbers are worked out by hand from docs/method.md, "Mixed precision", METHOD §6 (scores, HAWQ-V2, the
// loss per token) and docs/formats.md (what the datasets hold, what a checkpoint stores). E: mean over the
// sequences and their label draws; T: predicted tokens of a sequence.
//
// s of a set: Σ over its linears, draw by draw.
//
// diagonal: ½ E[s²] / T.
//
// hawq-v2: ½ Σ (E‖GᵀX‖² / (d_out d_in)) ‖ΔW‖² / T, the Fisher matrix's mean eigenvalue × ‖ΔW‖².
//
// output: Σ E‖X ΔWᵀ‖² / T.
//
// weighted: ½ Σ E tr(ΔW XᵀDX ΔWᵀ) / T.
//
// stored bits: d_out d_in (b + (bits of a scale + (asymmetric) b of a zero) / group).
namespace isobath::pipeline {
namespace {

using model::Projection;

/// Every expected value is a fraction of small integers; f64 sums of at most a few dozen terms.
constexpr double kRounding = 1e-12;

constexpr int64_t kSequences = 3, kSamples = 2, kGroup = 4;
// Five tokens a sequence, the first of which is predicted by nothing: T = 4.
constexpr int64_t kTokens = 15;

at::Tensor table(std::vector<double> values, at::IntArrayRef shape) {
  return at::tensor(values, at::kDouble).reshape(shape);
}

ModuleStatistics module_of(Perturbations perturbations) {
  ModuleStatistics module;
  module.sum_x2 = at::ones({1}, at::kDouble);  // a group without datasets cannot be written
  module.perturbations = std::move(perturbations);
  module.perturbations.bits = {2, 4};
  module.perturbations.grid = {.group = kGroup};
  module.n_tokens = kTokens;
  module.n_sequences = kSequences;
  return module;
}

/// s = factor in every draw at 2 bits and half of it at 4; hawq-v2, output and weighted come out as factor at
/// 2 bits and half of it at 4.
ModuleStatistics constant_module(double factor, int64_t n_weights) {
  const at::Tensor widths = table({1, 0.5}, {2}) * factor;
  Perturbations p;
  p.first_order = widths.expand({kSequences, kSamples, 2}).contiguous();
  p.output_change = (4 * widths).expand({kSequences, 2}).contiguous();
  p.weighted_change = (8 * widths).expand({kSequences, 2}).contiguous();
  p.gradient_norm = at::full({kSequences, kSamples}, static_cast<double>(n_weights) * factor, at::kDouble);
  p.weight_change = table({8, 4}, {2});
  return module_of(p);
}

/// q, k and v of block 0: all draws, sequences and widths differ.
ModuleStatistics query() {
  Perturbations p;
  p.first_order = table({1, 0.5, -1, 0, 2, 1, 0, 0.5, -1, -0.5, 1, 0}, {3, 2, 2});
  p.output_change = table({3, 1, 6, 0, 0, 2}, {3, 2});        // sums 9, 3
  p.weighted_change = table({1, 0, 2, 1, 3, 0.5}, {3, 2});    // sums 6, 1.5
  p.gradient_norm = table({64, 128, 0, 64, 64, 64}, {3, 2});  // mean 64, of 64 weights: 1
  p.weight_change = table({8, 2}, {2});
  return module_of(p);
}
ModuleStatistics key() {
  Perturbations p;
  p.first_order = table({1, 0, 1, 0.5, 0, 0, 2, 0.5, -1, 0.5, -1, 0}, {3, 2, 2});
  p.output_change = table({1, 0.5, 1, 0.5, 1, 2}, {3, 2});    // sums 3, 3
  p.weighted_change = table({0, 0, 1, 0.5, 5, 1}, {3, 2});    // sums 6, 1.5
  p.gradient_norm = table({32, 64, 96, 64, 64, 64}, {3, 2});  // mean 64, of 32 weights: 2
  p.weight_change = table({4, 1}, {2});
  return module_of(p);
}
ModuleStatistics value() {
  Perturbations p;
  p.first_order = table({0, 0.5, 2, -0.5, -2, 0, 0, 0, 0, 0, 1, 1}, {3, 2, 2});
  p.output_change = table({12, 0, 0, 0, 0, 6}, {3, 2});      // sums 12, 6
  p.weighted_change = table({4, 1, 4, 1, 4, 1}, {3, 2});     // sums 12, 3
  p.gradient_norm = table({16, 32, 0, 16, 16, 16}, {3, 2});  // mean 16, of 32 weights: ½
  p.weight_change = table({16, 2}, {2});
  return module_of(p);
}

/// The statistics of a model of two blocks; tests change them, the model or the configuration, and read.
class ReadProblem : public ::testing::Test {
 protected:
  ReadProblem() {
    config_.quantization.group = kGroup;
    model_ = plan::tiny_model();
    model_.n_blocks = 2;
    // q [8, 8], k and v [4, 8], o [8, 8], gate and up [16, 8], down [8, 16].
    blocks_[0] = {query(),
                  key(),
                  value(),
                  constant_module(1, 64),
                  constant_module(2, 128),
                  constant_module(3, 128),
                  constant_module(4, 128)};
    blocks_[1] = {constant_module(1, 64), constant_module(2, 32),  constant_module(3, 32),
                  constant_module(7, 64), constant_module(4, 128), constant_module(5, 128),
                  constant_module(8, 128)};
  }

  Perturbations& scores(size_t block, Projection projection) {
    return blocks_[block][static_cast<size_t>(projection)].perturbations;
  }

  AllocationProblem read() const {
    for (size_t block = 0; block < blocks_.size(); ++block)
      write_statistics(scratch_.path(), static_cast<int64_t>(block), {{"model", "tiny"}}, blocks_[block]);
    return read_problem(config_, model_, scratch_.path());
  }

  /// Reads, expecting an error of type E whose message holds `texts`.
  template <class E>
  void expect_error(const std::vector<std::string>& texts) const {
    try {
      (void)read();
      ADD_FAILURE() << "expected an error that tells " << texts[0];
    } catch (const E& error) {
      for (const std::string& text : texts)
        EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << text << " in " << error.what();
    }
  }

  config::RunConfig config_;
  model::ModelConfig model_;
  std::array<BlockStatistics, 2> blocks_;
  model::ScratchDirectory scratch_{"allocation_problem_test"};
};

void expect_near(const std::vector<double>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i)
    EXPECT_NEAR(found[i], expected[i], kRounding) << "candidate " << i;
}

TEST_F(ReadProblem, HasASetForTheLinearsThatReadOneInputBlockAfterBlock) {
  const AllocationProblem problem = read();

  const std::vector<std::string> names = {"block 0, q/k/v",   "block 0, o",     "block 0, gate/up",
                                          "block 0, down",    "block 1, q/k/v", "block 1, o",
                                          "block 1, gate/up", "block 1, down"};
  const std::vector<int64_t> n_weights = {128, 64, 256, 128, 128, 64, 256, 128};
  ASSERT_EQ(problem.sets.size(), names.size());
  for (size_t set = 0; set < names.size(); ++set) {
    EXPECT_EQ(problem.sets[set].name(), names[set]);
    EXPECT_EQ(problem.sets[set].n_weights, n_weights[set]) << names[set];
    EXPECT_EQ(problem.sets[set].bits, (std::vector<int64_t>{2, 4})) << names[set];
  }
  EXPECT_EQ(problem.sets[6].modules,
            (std::vector<std::string>{"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}));
  EXPECT_EQ(problem.n_weights, 1152);
  EXPECT_EQ(problem.scores.block, (std::vector<int64_t>{0, 0, 0, 0, 1, 1, 1, 1}));
  EXPECT_EQ(problem.scores.kind, (std::vector<int64_t>{0, 1, 2, 3, 0, 1, 2, 3}));
  EXPECT_EQ(problem.scores.bits, (std::vector<int64_t>{2, 4, 2, 4, 2, 4, 2, 4, 2, 4, 2, 4, 2, 4, 2, 4}));
  EXPECT_EQ(problem.candidates.first, (std::vector<int64_t>{0, 2, 4, 6, 8, 10, 12, 14, 16}));
  EXPECT_EQ(problem.bits_of(7, 15), 4);
  EXPECT_NEAR(problem.mean_bits(7488), 6.5, kRounding);
}

TEST_F(ReadProblem, ScoresOfASetAddUpDrawByDraw) {
  const AllocationProblem problem = read();

  EXPECT_EQ(problem.scores.samples, kSamples);
  EXPECT_EQ(problem.scores.n_sequences(), kSequences);
  EXPECT_EQ(problem.scores.tokens_per_sequence, 4);
  ASSERT_EQ(problem.scores.values.sizes(), (std::vector<int64_t>{6, 16}));
  // q/k/v of block 0: sums over three linears, a row a sequence and draw.
  EXPECT_TRUE(
      at::equal(problem.scores.values.slice(1, 0, 2), table({2, 1, 2, 0, 0, 1, 2, 1, -2, 0, 1, 1}, {6, 2})));
  // The others: the sum of the factors of a set, and half of it.
  EXPECT_TRUE(at::equal(problem.scores.values.slice(1, 2),
                        table({1, 0.5, 5, 2.5, 4, 2, 6, 3, 7, 3.5, 9, 4.5, 8, 4}, {1, 14}).expand({6, 14})));
}

TEST_F(ReadProblem, TheDiagonalTakesTheLinearsOfASetTogether) {
  const AllocationProblem problem = read();

  const std::vector<double> diagonal =
      allocate::estimate_loss(problem.scores.without_prior(), problem.candidates).diagonal();

  // ½·(4 + 4 + 0 + 4 + 4 + 1)/6/4 and ½·(1 + 0 + 1 + 1 + 0 + 1)/6/4: q, k and v each by itself would give 25
  // for the 17. The others: ½ F²/4 and ½ (F/2)²/4.
  expect_near(diagonal, {17. / 48, 4. / 48, 1. / 8, 1. / 32, 25. / 8, 25. / 32, 16. / 8, 16. / 32, 36. / 8,
                         36. / 32, 49. / 8, 49. / 32, 81. / 8, 81. / 32, 64. / 8, 64. / 32});
}

TEST_F(ReadProblem, BaselinesAddUpTheLinearsOfASet) {
  const AllocationProblem problem = read();
  const auto with_others = [](double at_2_bits, double at_4_bits) {
    return std::vector<double>{at_2_bits, at_4_bits, 1, 0.5, 5, 2.5, 4, 2, 6, 3, 7, 3.5, 9, 4.5, 8, 4};
  };

  ASSERT_EQ(problem.scored.size(), 3U);
  // ½·(1·8 + 2·4 + ½·16)/4, ½·(1·2 + 2·1 + ½·2)/4.
  expect_near(problem.scored.at("hawq-v2"), with_others(3, 0.625));
  // (9 + 3 + 12)/3/4, (3 + 3 + 6)/3/4.
  expect_near(problem.scored.at("output"), with_others(2, 1));
  // ½·(6 + 6 + 12)/3/4, ½·(1.5 + 1.5 + 3)/3/4.
  expect_near(problem.scored.at("weighted"), with_others(1, 0.25));
}

TEST_F(ReadProblem, ThePriorIsWhatWeightedAddsUpSequenceBySequence) {
  const AllocationProblem problem = read();

  ASSERT_EQ(problem.scores.prior.sizes(), (std::vector<int64_t>{kSequences, 16}));
  EXPECT_TRUE(at::allclose(problem.scores.prior.slice(1, 0, 2), table({5, 1, 7, 2.5, 12, 2.5}, {3, 2})));
  EXPECT_TRUE(at::allclose(problem.scores.prior.select(1, 4), at::full({3}, 40.0, at::kDouble)));
}

TEST_F(ReadProblem, StoredBitsCountTheScales) {
  // 16 bits for 4 weights: b + 4 a weight.
  EXPECT_EQ(read().candidates.cost, (std::vector<int64_t>{768, 1024, 384, 512, 1536, 2048, 768, 1024, 768,
                                                          1024, 384, 512, 1536, 2048, 768, 1024}));

  model_.dtype = at::kFloat;  // b + 8
  EXPECT_EQ(read().candidates.cost[0], 1280);
}

TEST_F(ReadProblem, StoredBitsCountTheZerosAndTheGroupOfEachLinear) {
  config_.quantization.symmetric = false;
  config_.quantization.overrides = {{.match = "re:.*down_proj", .group = 0}};
  for (size_t block = 0; block < blocks_.size(); ++block)
    for (ModuleStatistics& module : blocks_[block]) module.perturbations.grid.symmetric = false;
  for (size_t block = 0; block < blocks_.size(); ++block) scores(block, Projection::down).grid.group = 0;

  const AllocationProblem problem = read();

  // b + (16 + b)/4, and for down b + (16 + b)/16: a row is one group.
  const std::vector<int64_t> of_a_block = {832, 1152, 416, 576, 1664, 2304, 400, 672};
  std::vector<int64_t> expected = of_a_block;
  expected.insert(expected.end(), of_a_block.begin(), of_a_block.end());
  EXPECT_EQ(problem.candidates.cost, expected);
}

TEST_F(ReadProblem, IgnoredLinearsTakeNoPart) {
  config_.quantization.ignore = {"re:.*v_proj", "re:.*layers.1.*"};
  scores(0, Projection::v) = {};
  for (ModuleStatistics& module : blocks_[1]) module.perturbations = {};

  const AllocationProblem problem = read();

  ASSERT_EQ(problem.sets.size(), 4U);
  EXPECT_EQ(problem.sets[0].modules.size(), 2U);
  EXPECT_EQ(problem.n_weights, 544);
  EXPECT_EQ(problem.candidates.cost[0], 96 * (2 + 4));
  // ½·(1·8 + 2·4)/4.
  EXPECT_NEAR(problem.scored.at("hawq-v2")[0], 2, kRounding);
}

TEST_F(ReadProblem, AnOverrideLeavesASetOneWidth) {
  config_.quantization.overrides = {{.match = "model.layers.0.self_attn.k_proj", .bits = 4}};

  const AllocationProblem problem = read();

  EXPECT_EQ(problem.sets[0].bits, (std::vector<int64_t>{4}));
  EXPECT_EQ(problem.candidates.first, (std::vector<int64_t>{0, 1, 3, 5, 7, 9, 11, 13, 15}));
  EXPECT_EQ(problem.candidates.cost[0], 1024);
  EXPECT_TRUE(at::equal(problem.scores.values.select(1, 0), table({1, 0, 1, 1, 0, 1}, {6})));
  EXPECT_NEAR(problem.scored.at("output")[0], 1, kRounding);
}

TEST_F(ReadProblem, RefusesLinearsWithoutScores) {
  scores(1, Projection::up) = {};

  expect_error<ConfigError>(
      {"block-00001.h5", "no scores", "model.layers.1.mlp.up_proj", "sensitivity.gram.bits"});
}

TEST_F(ReadProblem, RefusesScoresOfAnotherGrid) {
  config_.quantization.group = 8;
  expect_error<ConfigError>(
      {"model.layers.0.self_attn.q_proj", "group 4, symmetric, clip search, not group 8"});

  config_.quantization.group = kGroup;
  config_.quantization.overrides = {{.match = "model.layers.1.mlp.down_proj", .group = 0}};
  expect_error<ConfigError>({"model.layers.1.mlp.down_proj", "not group channel"});

  config_.quantization.overrides = {};
  config_.quantization.symmetric = false;
  expect_error<ConfigError>({"not group 4, asymmetric, clip search"});

  config_.quantization.symmetric = true;
  config_.quantization.clip_search = false;
  expect_error<ConfigError>({"not group 4, symmetric, min-max"});
}

TEST_F(ReadProblem, RefusesOverridesThatNoCandidateMeets) {
  config_.quantization.overrides = {{.match = "re:.*layers.1.*", .bits = 3}};
  expect_error<ConfigError>({"3 bits", "block 1, q/k/v", "only 2, 4 were scored"});

  config_.quantization.overrides = {{.match = "re:.*gate_proj", .bits = 2},
                                    {.match = "re:.*up_proj", .bits = 4}};
  expect_error<ConfigError>({"split block 0, gate/up", "found 2, 4"});

  config_.quantization.overrides = {};
  config_.quantization.ignore = {"re:.*"};
  expect_error<ConfigError>({"quantization.ignore leaves no linear"});
}

TEST_F(ReadProblem, RefusesScoresThatDoNotBelongTogether) {
  const BlockStatistics whole = blocks_[1];

  scores(1, Projection::k).bits = {2, 3};
  expect_error<DataError>({"block 1, q/k/v", "found 2, 4 and 2, 3"});

  blocks_[1] = whole;
  Perturbations& o = scores(1, Projection::o);
  for (at::Tensor* values : {&o.first_order, &o.output_change, &o.weighted_change, &o.gradient_norm})
    *values = values->slice(0, 0, 2).contiguous();
  expect_error<DataError>({"expected scores of 3 sequences and 2 draws", "found 2 and 2"});
}

TEST_F(ReadProblem, RefusesScoresThatAreNotFinite) {
  at::Tensor& output = scores(1, Projection::gate).output_change;
  output[2][1] = std::numeric_limits<double>::quiet_NaN();

  expect_error<DataError>({"block 1, gate/up at 4 bits", "not finite"});
}

}  // namespace
}  // namespace isobath::pipeline
