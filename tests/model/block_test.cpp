#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <isobath/model/block.hpp>

namespace isobath::model {
namespace {

// f32 sums of some dozen terms in two orders.
constexpr double kF32SumError = 1e-5;
constexpr double kEps = 1e-5;

ModelConfig small_config() {
  ModelConfig config;
  config.d_model = 8;
  config.d_ff = 12;
  config.n_blocks = 1;
  config.n_heads = 4;
  config.n_kv_heads = 2;
  config.head_dim = 4;
  config.rms_eps = kEps;
  return config;
}

at::Tensor random_normal(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kFloat));
}

BlockWeights random_block(const ModelConfig& config) {
  BlockWeights weights{.input_norm = random_normal({config.d_model}, 100),
                       .post_attention_norm = random_normal({config.d_model}, 101),
                       .linears = {}};
  for (int p = 0; p < kProjections; ++p) {
    const ModuleShape shape = module_shape(config, static_cast<Projection>(p));
    weights.linears[static_cast<size_t>(p)] = {
        random_normal({shape.rows, shape.columns}, 102 + static_cast<uint64_t>(p)),
        random_normal({shape.rows}, 110 + static_cast<uint64_t>(p))};
  }
  return weights;
}

at::Tensor plain_linear(Projection, const at::Tensor& x, const Linear& linear) {
  return apply_linear(x, linear);
}

TEST(RmsNorm, DividesByTheRootMeanSquare) {
  const at::Tensor x = at::tensor({3.0F, 4.0F}).reshape({1, 1, 2});  // mean square 12.5
  const at::Tensor y = rms_norm(x, at::tensor({1.0F, 2.0F}), 0.0);

  EXPECT_NEAR(y[0][0][0].item<double>(), 3.0 / std::sqrt(12.5), kF32SumError);
  EXPECT_NEAR(y[0][0][1].item<double>(), 8.0 / std::sqrt(12.5), kF32SumError);
}

TEST(RmsNorm, RoundsToBf16BeforeTheProductWithTheWeight) {
  const at::Tensor x = random_normal({1, 3, 8}, 1).to(at::kBFloat16);
  const at::Tensor weight = random_normal({8}, 2).to(at::kBFloat16);

  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor unit = wide / (wide.square().mean(-1, true) + kEps).sqrt();
  // One bf16 rounding of unit (2^-9) may fall on the other side of a tie; two would show as more.
  EXPECT_TRUE(at::allclose(rms_norm(x, weight, kEps).to(at::kFloat),
                           (weight * unit.to(at::kBFloat16)).to(at::kFloat),
                           /*rtol=*/0x1p-7, /*atol=*/0));
  EXPECT_EQ(rms_norm(x, weight, kEps).scalar_type(), at::kBFloat16);
}

TEST(Attend, EqualsLoopsOverHeadsAndPositions) {
  const ModelConfig config = small_config();
  constexpr int64_t kLength = 5;
  const Rotary rotary = Rotary::make(config, 8, at::kCPU);
  const at::Tensor q = random_normal({1, kLength, 16}, 3), k = random_normal({1, kLength, 8}, 4),
                   v = random_normal({1, kLength, 8}, 5);
  // Channels (c, c + 2) of a head turn by position · 10000^(-c/2).
  const auto turned = [](const at::Tensor& head, int64_t position) {
    std::vector<double> out(4);
    for (int64_t c = 0; c < 2; ++c) {
      const double angle = static_cast<double>(position) * std::pow(10000.0, -static_cast<double>(c) / 2);
      const auto low = head[c].item<double>(), high = head[c + 2].item<double>();
      out[static_cast<size_t>(c)] = low * std::cos(angle) - high * std::sin(angle);
      out[static_cast<size_t>(c + 2)] = high * std::cos(angle) + low * std::sin(angle);
    }
    return out;
  };

  const at::Tensor mixed = attend(config, rotary, q, k, v);

  for (int64_t head = 0; head < 4; ++head) {
    const int64_t kv = head / 2;
    for (int64_t t = 0; t < kLength; ++t) {
      const auto query = turned(q[0][t].narrow(0, 4 * head, 4), t);
      std::vector<double> weight;
      double total = 0;
      for (int64_t s = 0; s <= t; ++s) {
        const auto key = turned(k[0][s].narrow(0, 4 * kv, 4), s);
        double score = 0;
        for (size_t c = 0; c < 4; ++c) score += query[c] * key[c];
        weight.push_back(std::exp(score / 2));
        total += weight.back();
      }
      for (int64_t c = 0; c < 4; ++c) {
        double expected = 0;
        for (int64_t s = 0; s <= t; ++s) {
          expected += weight[static_cast<size_t>(s)] / total * v[0][s][4 * kv + c].item<double>();
        }
        EXPECT_NEAR(mixed[0][t][4 * head + c].item<double>(), expected, kF32SumError)
            << head << " " << t << " " << c;
      }
    }
  }
}

TEST(BlockForward, AppliesTheSevenLinearsInOrder) {
  const ModelConfig config = small_config();
  std::vector<Projection> order;
  (void)block_forward(config, Rotary::make(config, 3, at::kCPU), random_block(config),
                      random_normal({1, 3, 8}, 6),
                      [&](Projection p, const at::Tensor& x, const Linear& linear) {
                        order.push_back(p);
                        return apply_linear(x, linear);
                      });

  std::vector<Projection> expected;
  for (int set = 0; set < kInputSets; ++set)
    expected.insert(expected.end(), input_set(set).begin(), input_set(set).end());
  EXPECT_EQ(order, expected);
}

TEST(BlockForward, LaterTokensDoNotReachEarlierOnesOrTheirGradients) {
  const ModelConfig config = small_config();
  constexpr int64_t kLength = 4, kPadded = 7;
  const Rotary rotary = Rotary::make(config, kPadded, at::kCPU);
  const BlockWeights weights = random_block(config);
  at::Tensor x = random_normal({1, kPadded, 8}, 7), other = x.clone();
  other.narrow(1, kLength, kPadded - kLength).fill_(3.0);
  at::Tensor gradient = random_normal({1, kPadded, 8}, 8);
  gradient.narrow(1, kLength, kPadded - kLength).zero_();

  const auto run = [&](const at::Tensor& input) {
    const at::Tensor leaf = input.clone().requires_grad_();
    const at::Tensor y = block_forward(config, rotary, weights, leaf, plain_linear);
    y.backward(gradient);
    return std::pair(y.detach(), leaf.grad());
  };
  const auto [y, y_gradient] = run(x);
  const auto [other_y, other_gradient] = run(other);

  EXPECT_TRUE(at::equal(y.narrow(1, 0, kLength), other_y.narrow(1, 0, kLength)));
  EXPECT_TRUE(at::equal(y_gradient, other_gradient));
  EXPECT_EQ(y_gradient.narrow(1, kLength, kPadded - kLength).abs().max().item<double>(), 0.0);
}

TEST(BlockForward, GivesTheSameBitsTwice) {
  const ModelConfig config = small_config();
  const Rotary rotary = Rotary::make(config, 6, at::kCPU);
  const BlockWeights weights = random_block(config);
  const at::Tensor x = random_normal({2, 6, 8}, 9);

  EXPECT_TRUE(at::equal(block_forward(config, rotary, weights, x, plain_linear),
                        block_forward(config, rotary, weights, x.clone(), plain_linear)));
}

}  // namespace
}  // namespace isobath::model
