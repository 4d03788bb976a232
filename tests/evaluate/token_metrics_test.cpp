#include <gtest/gtest.h>
#include <isobath/core/error.hpp>
#include <isobath/evaluate/token_metrics.hpp>
#include <limits>

namespace isobath::evaluate {
namespace {

// Log-probabilities of f32 logits over a vocabulary of 200: a few units in the last place of numbers near 10.
constexpr double kNatTolerance = 2e-5;
constexpr int64_t kVocabulary = 200, kModel = 16;

struct Models {
  model::ModelConfig config;
  model::HeadWeights original, quantized;
  at::Tensor hidden_original, hidden_quantized, tokens;

  explicit Models(int64_t n_windows, int64_t length) {
    at::manual_seed(9);
    config.d_model = kModel;
    config.vocab_size = kVocabulary;
    config.dtype = at::kFloat;
    original = {at::rand({kModel}) + 0.5, at::randn({kVocabulary, kModel})};
    quantized = {original.final_norm, original.lm_head + 0.1 * at::randn({kVocabulary, kModel})};
    hidden_original = at::randn({n_windows, length, kModel});
    hidden_quantized = hidden_original + 0.2 * at::randn({n_windows, length, kModel});
    tokens = at::randint(kVocabulary, {n_windows, length}, at::kInt);
  }
  [[nodiscard]] TokenMetrics compare_all() const {
    return compare(config, {&original, hidden_original}, {{&quantized, hidden_quantized}}, tokens)[0];
  }
  /// Log-probabilities by the formulas, f64: [b, T-1, vocab].
  [[nodiscard]] at::Tensor reference(const model::HeadWeights& head, const at::Tensor& hidden) const {
    const at::Tensor x = hidden.to(at::kDouble);
    const at::Tensor normed =
        x / (x.square().mean(-1, true) + config.rms_eps).sqrt() * head.final_norm.to(at::kDouble);
    const at::Tensor logits = at::matmul(normed, head.lm_head.to(at::kDouble).t());
    return (logits - logits.exp().sum(-1, true).log()).slice(1, 0, hidden.size(1) - 1);
  }
};

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

TEST(TokenMetrics, AgreeWithTheFormulasInDoublePrecision) {
  const Models m(2, 11);
  const TokenMetrics found = m.compare_all();
  ASSERT_EQ(found.nll_original.sizes(), (at::IntArrayRef{2, 10}));
  const at::Tensor p = m.reference(m.original, m.hidden_original),
                   q = m.reference(m.quantized, m.hidden_quantized);
  const at::Tensor labels = m.tokens.slice(1, 1, 11).to(at::kLong).unsqueeze(2);
  EXPECT_LT(largest_difference(found.nll_original, -p.gather(2, labels).squeeze(2)), kNatTolerance);
  EXPECT_LT(largest_difference(found.nll_quantized, -q.gather(2, labels).squeeze(2)), kNatTolerance);
  EXPECT_LT(largest_difference(found.kl, (p.exp() * (p - q)).sum(2)), kNatTolerance);
  EXPECT_TRUE(at::equal(found.same_top1, (p.argmax(2) == q.argmax(2)).to(at::kByte)));
  const auto n_same = found.same_top1.sum().item<int64_t>();
  EXPECT_TRUE(0 < n_same && n_same < 20) << "the case must tell agreement from disagreement";
}

TEST(TokenMetrics, DoNotDependOnWhereChunksAndWindowsAreCut) {
  // 300 tokens are several chunks; the first 140 end inside the second one.
  const Models m(2, 300);
  const TokenMetrics whole = m.compare_all();
  const auto cut = [](const at::Tensor& values) { return values.slice(0, 1, 2).slice(1, 0, 140); };
  const TokenMetrics part = compare(m.config, {&m.original, cut(m.hidden_original)},
                                    {{&m.quantized, cut(m.hidden_quantized)}}, cut(m.tokens))[0];
  EXPECT_LT(largest_difference(part.nll_original[0], whole.nll_original[1].slice(0, 0, 139)), kNatTolerance);
  EXPECT_LT(largest_difference(part.nll_quantized[0], whole.nll_quantized[1].slice(0, 0, 139)),
            kNatTolerance);
  EXPECT_LT(largest_difference(part.kl[0], whole.kl[1].slice(0, 0, 139)), kNatTolerance);
  EXPECT_TRUE(at::equal(part.same_top1[0], whole.same_top1[1].slice(0, 0, 139)));
}

TEST(TokenMetrics, OfIdenticalModelsShowNoDivergence) {
  const Models m(1, 150);
  const TokenMetrics found =
      compare(m.config, {&m.original, m.hidden_original}, {{&m.original, m.hidden_original}}, m.tokens)[0];
  EXPECT_EQ(found.kl.abs().max().item<float>(), 0.0F);
  EXPECT_TRUE(at::equal(found.nll_quantized, found.nll_original));
  EXPECT_EQ(found.same_top1.sum().item<int64_t>(), 149);
}

TEST(TokenMetrics, OfSeveralModelsAreThoseOfEachAlone) {
  const Models m(1, 150);
  const std::vector<TokenMetrics> both =
      compare(m.config, {&m.original, m.hidden_original},
              {{&m.original, m.hidden_original}, {&m.quantized, m.hidden_quantized}}, m.tokens);
  ASSERT_EQ(both.size(), 2U);
  EXPECT_EQ(both[0].kl.abs().max().item<float>(), 0.0F);
  EXPECT_TRUE(at::equal(both[1].kl, m.compare_all().kl));
  EXPECT_TRUE(at::equal(both[1].nll_quantized, m.compare_all().nll_quantized));
}

TEST(TokenMetrics, DivergenceIsNeverNegativeBeyondRounding) {
  Models m(1, 130);
  m.hidden_quantized = m.hidden_original * (1 + 1e-6 * at::randn({kModel}));
  m.quantized = m.original;
  EXPECT_GT(m.compare_all().kl.min().item<double>(), -kNatTolerance);
}

TEST(TokenMetrics, OfOneModelHoldItsLossOnly) {
  const Models m(1, 20);
  const TokenMetrics alone = compare(m.config, {&m.original, m.hidden_original}, {}, m.tokens)[0];
  // Another order of the same operations.
  EXPECT_LT(largest_difference(alone.nll_original, m.compare_all().nll_original), kNatTolerance);
  EXPECT_FALSE(alone.nll_quantized.defined() || alone.kl.defined() || alone.same_top1.defined());
}

TEST(TokenMetrics, NameTheTokenOfANonFiniteLoss) {
  Models m(2, 20);
  m.hidden_quantized[1][7][0] = std::numeric_limits<float>::quiet_NaN();
  try {
    (void)m.compare_all();
    FAIL() << "a loss that is not a number was accepted";
  } catch (const NumericError& error) {
    EXPECT_NE(std::string(error.what()).find("quantized model"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("row 1 of the batch, token 7"), std::string::npos)
        << error.what();
  }
}

TokenMetrics window(std::vector<float> original, std::vector<float> quantized, std::vector<float> kl,
                    std::vector<uint8_t> same) {
  const auto row = [](const auto& values) { return at::tensor(values).unsqueeze(0); };
  return {row(original), row(quantized), row(kl), row(same)};
}

TEST(Summary, IsWhatOneComputesByHand) {
  const Summary s = summarise({window({1, 2}, {2, 3}, {0.0F, 4.0F}, {1, 0}), window({3}, {4}, {1.0F}, {1})});
  EXPECT_EQ(s.n_tokens, 3);
  EXPECT_TRUE(s.has_quantized);
  EXPECT_DOUBLE_EQ(s.perplexity_original, std::exp(2.0));
  EXPECT_DOUBLE_EQ(s.perplexity, std::exp(3.0));
  EXPECT_DOUBLE_EQ(s.kl_mean, 5.0 / 3.0);
  EXPECT_DOUBLE_EQ(s.kl_median, 1.0);
  EXPECT_DOUBLE_EQ(s.kl_p99, 1.0 + 0.98 * 3.0);  // numpy.quantile([0, 1, 4], 0.99), linear
  EXPECT_DOUBLE_EQ(s.top1_agreement, 2.0 / 3.0);
}

TEST(Summary, OfOneModelRepeatsItsPerplexity) {
  TokenMetrics alone;
  alone.nll_original = at::tensor({0.5F, 1.5F}).unsqueeze(0);
  const Summary s = summarise({alone});
  EXPECT_FALSE(s.has_quantized);
  EXPECT_DOUBLE_EQ(s.perplexity_original, std::exp(1.0));
  EXPECT_DOUBLE_EQ(s.perplexity, s.perplexity_original);
  EXPECT_EQ(s.kl_mean, 0.0);
}

TEST(Summary, RefusesNothingAndMixedWindows) {
  EXPECT_THROW((void)summarise({}), InternalError);
  TokenMetrics alone;
  alone.nll_original = at::ones({1, 2});
  EXPECT_THROW((void)summarise({window({1}, {1}, {0}, {1}), alone}), InternalError);
}

}  // namespace
}  // namespace isobath::evaluate
