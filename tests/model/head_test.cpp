#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/core/random.hpp>
#include <isobath/model/head.hpp>

namespace isobath::model {
namespace {

// f32 sums of some hundred terms in two orders.
constexpr double kF32SumError = 1e-5;
// 7 degrees of freedom: a right sampler exceeds 40 once in a million seeds, and the seed is fixed.
constexpr double kMaxChiSquare = 40;

constexpr int64_t kVocabSize = 8, kDModel = 6;

ModelConfig small_config() {
  ModelConfig config;
  config.vocab_size = kVocabSize;
  config.d_model = kDModel;
  return config;
}

at::Tensor random_normal(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kFloat));
}

HeadWeights small_head() {
  return {.final_norm = 1 + 0.1 * random_normal({kDModel}, 1),
          .lm_head = random_normal({kVocabSize, kDModel}, 2)};
}

at::Tensor random_tokens(int64_t n_sequences, int64_t length) {
  return at::randint(kVocabSize, {n_sequences, length}, at::detail::createCPUGenerator(3),
                     at::TensorOptions(at::kInt));
}

at::Tensor lengths_of(std::initializer_list<int64_t> lengths) {
  return at::tensor(std::vector<int64_t>(lengths)).to(at::kInt);
}

double relative_distance(const at::Tensor& found, const at::Tensor& expected) {
  return ((found - expected).norm() / expected.norm()).item<double>();
}

TEST(LossAndGradient, EqualsAutogradOfTheWholeLogits) {
  // 300 positions cross a chunk border; sequences that end before, at and after it, and one that predicts
  // nothing.
  const at::Tensor lengths = lengths_of({300, 256, 257, 258, 2, 1});
  const at::Tensor tokens = random_tokens(6, 300);
  at::Tensor hidden = random_normal({6, 300, kDModel}, 4).requires_grad_();

  const at::Tensor log_probabilities = at::log_softmax(head_logits(small_config(), small_head(), hidden), -1);
  at::Tensor expected = at::zeros({});
  int64_t n_predicted = 0;
  for (int64_t row = 0; row < 6; ++row) {
    const int64_t n = lengths[row].item<int64_t>() - 1;
    n_predicted += n;
    expected = expected - log_probabilities[row]
                              .narrow(0, 0, n)
                              .gather(1, tokens[row].narrow(0, 1, n).to(at::kLong).unsqueeze(1))
                              .sum();
  }
  expected.backward();
  const LossResult result =
      loss_and_gradient(small_config(), small_head(), hidden.detach(), tokens, lengths, {0, 6}, {});

  EXPECT_EQ(result.n_predicted, n_predicted);
  EXPECT_NEAR(result.nll_sum, expected.item<double>(), kF32SumError * expected.item<double>());
  EXPECT_EQ(result.gradient.sizes(), (std::vector<int64_t>{1, 6, 300, kDModel}));
  EXPECT_LE(relative_distance(result.gradient[0], hidden.grad()), kF32SumError);
}

TEST(LossAndGradient, OfTheDivergenceEqualsAutograd) {
  // Chunk borders and padding as above.
  const at::Tensor lengths = lengths_of({300, 257, 2, 1});
  const at::Tensor tokens = random_tokens(4, 300);
  const at::Tensor original = random_normal({4, 300, kDModel}, 9);
  at::Tensor hidden = (original + 0.1 * random_normal({4, 300, kDModel}, 10)).requires_grad_();

  const auto log_probabilities = [](const at::Tensor& h) {
    return at::log_softmax(head_logits(small_config(), small_head(), h), -1);
  };
  const at::Tensor log_p = log_probabilities(original), log_q = log_probabilities(hidden);
  const at::Tensor divergences = (log_p.exp() * (log_p - log_q)).sum(-1);
  at::Tensor expected = at::zeros({});
  for (int64_t row = 0; row < 4; ++row)
    expected = expected + divergences[row].narrow(0, 0, lengths[row].item<int64_t>() - 1).sum();
  expected.backward();
  const LossResult result = loss_and_gradient(small_config(), small_head(), hidden.detach(), tokens, lengths,
                                              {0, 4}, {.kind = LossKind::kl}, original);

  EXPECT_NEAR(result.kl_sum, expected.item<double>(), kF32SumError * expected.item<double>());
  EXPECT_LE(relative_distance(result.gradient[0], hidden.grad()), kF32SumError);
  EXPECT_EQ(result.n_predicted, 299 + 256 + 1);
}

TEST(LossAndGradient, TheOriginalDoesNotDivergeFromItself) {
  const at::Tensor hidden = random_normal({1, 9, kDModel}, 11), tokens = random_tokens(1, 9);
  const auto loss = [&](LossKind kind, const at::Tensor& original) {
    return loss_and_gradient(small_config(), small_head(), hidden, tokens, lengths_of({9}), {0, 1},
                             {.kind = kind}, original);
  };

  const LossResult divergence = loss(LossKind::kl, hidden);

  EXPECT_EQ(divergence.gradient.abs().max().item<double>(), 0.0);
  EXPECT_EQ(divergence.nll_sum, loss(LossKind::nll, {}).nll_sum);
  EXPECT_THROW((void)loss(LossKind::kl, {}), InternalError);
}

TEST(LossAndGradient, PaddingChangesNothingAndGetsNoGradient) {
  constexpr int64_t kLength = 5, kPadded = 9;
  const at::Tensor lengths = lengths_of({kLength});
  at::Tensor tokens = random_tokens(1, kPadded), other_tokens = tokens.clone();
  at::Tensor hidden = random_normal({1, kPadded, kDModel}, 5), other_hidden = hidden.clone();
  other_tokens.narrow(1, kLength, kPadded - kLength).fill_(0);
  other_hidden.narrow(1, kLength, kPadded - kLength).fill_(7.0);

  const auto loss = [&](const at::Tensor& h, const at::Tensor& t) {
    return loss_and_gradient(small_config(), small_head(), h, t, lengths, {0, 1}, {});
  };
  const LossResult one = loss(hidden, tokens), other = loss(other_hidden, other_tokens);

  EXPECT_EQ(one.n_predicted, kLength - 1);
  EXPECT_EQ(one.nll_sum, other.nll_sum);
  EXPECT_TRUE(at::equal(one.gradient, other.gradient));
  EXPECT_EQ(one.gradient.narrow(2, kLength - 1, kPadded - kLength + 1).abs().max().item<double>(), 0.0);
  EXPECT_GT(one.gradient.narrow(2, kLength - 2, 1).abs().max().item<double>(), 0.0);
}

TEST(LossAndGradient, KeepsTheDtypeOfHidden) {
  HeadWeights head = small_head();
  head.final_norm = head.final_norm.to(at::kBFloat16);
  head.lm_head = head.lm_head.to(at::kBFloat16);
  const at::Tensor hidden = random_normal({1, 4, kDModel}, 6).to(at::kBFloat16);

  const LossResult result =
      loss_and_gradient(small_config(), head, hidden, random_tokens(1, 4), lengths_of({4}), {0, 1}, {});

  EXPECT_EQ(result.gradient.scalar_type(), at::kBFloat16);
  EXPECT_EQ(head_logits(small_config(), head, hidden).scalar_type(), at::kBFloat16);
}

TEST(LossAndGradient, NamesSequenceAndTokenOfANonFiniteLoss) {
  at::Tensor hidden = random_normal({2, 6, kDModel}, 7);
  hidden[1][3].fill_(std::numeric_limits<float>::quiet_NaN());
  try {
    (void)loss_and_gradient(small_config(), small_head(), hidden, random_tokens(2, 6), lengths_of({6, 6}),
                            {40, 42}, {});
    FAIL() << "a NaN went through";
  } catch (const NumericError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("sequence 41"), std::string::npos) << message;
    EXPECT_NE(message.find("token 3"), std::string::npos) << message;
  }
}

/// Draws labels for a position whose probabilities are known. A drawn label shows in the gradient: it is bit
/// for bit the one that the nll loss gives for that label.
class FisherLabels : public testing::Test {
 protected:
  FisherLabels() {
    for (int32_t label = 0; label < kVocabSize; ++label) {
      const at::Tensor tokens = at::full({1, 2}, label, at::kInt);
      gradient_of_label_.push_back(
          loss_and_gradient(small_config(), small_head(), hidden_, tokens, lengths_of({2}), {0, 1}, {})
              .gradient[0][0][0]);
    }
  }
  int64_t label_of(const at::Tensor& gradient) const {
    for (size_t label = 0; label < gradient_of_label_.size(); ++label) {
      if (at::equal(gradient, gradient_of_label_[label])) return static_cast<int64_t>(label);
    }
    return -1;
  }
  at::Tensor draw(Range sequences, int64_t n_samples) const {
    const LossSpec spec{.kind = LossKind::fisher, .n_samples = n_samples, .seed = 11};
    const int64_t n = sequences.size();
    return loss_and_gradient(small_config(), small_head(), hidden_.expand({n, 2, kDModel}).contiguous(),
                             at::zeros({n, 2}, at::kInt), at::full({n}, 2, at::kInt), sequences, spec)
        .gradient;
  }

  at::Tensor hidden_ = random_normal({1, 2, kDModel}, 8);
  at::Tensor probabilities_ =
      at::softmax(head_logits(small_config(), small_head(), hidden_)[0][0].to(at::kDouble), 0);
  std::vector<at::Tensor> gradient_of_label_;
};

TEST_F(FisherLabels, AreTheFirstWhoseCumulativeProbabilityExceedsTheUniformNumber) {
  const CounterRandom random(11, RandomPurpose::fisher_label);
  const at::Tensor gradient = draw({5, 8}, 20);
  for (int64_t sequence = 5; sequence < 8; ++sequence) {
    for (int64_t sample = 0; sample < 20; ++sample) {
      const double u = random.uniform(static_cast<uint64_t>(sequence), 0, static_cast<uint32_t>(sample));
      int64_t expected = 0;
      for (double sum = probabilities_[0].item<double>(); sum <= u;
           sum += probabilities_[expected].item<double>())
        ++expected;
      EXPECT_EQ(label_of(gradient[sample][sequence - 5][0]), expected) << sequence << " " << sample;
    }
  }
}

TEST_F(FisherLabels, FollowTheModelsDistribution) {
  constexpr int64_t kDraws = 4000;
  const at::Tensor gradient = draw({0, 1}, kDraws);
  std::vector<double> counts(kVocabSize);
  for (int64_t sample = 0; sample < kDraws; ++sample) {
    const int64_t label = label_of(gradient[sample][0][0]);
    ASSERT_GE(label, 0) << "sample " << sample << " has the gradient of no label";
    ++counts[static_cast<size_t>(label)];
  }
  double chi_square = 0;
  for (int64_t label = 0; label < kVocabSize; ++label) {
    const double expected = kDraws * probabilities_[label].item<double>();
    const double difference = counts[static_cast<size_t>(label)] - expected;
    chi_square += difference * difference / expected;
  }
  EXPECT_LE(chi_square, kMaxChiSquare);
}

TEST_F(FisherLabels, DoNotDependOnTheMicrobatch) {
  const at::Tensor together = draw({5, 8}, 3), alone = draw({6, 7}, 3);

  EXPECT_TRUE(at::equal(together.narrow(1, 1, 1), alone));
}

}  // namespace
}  // namespace isobath::model
