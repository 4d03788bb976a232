#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/model/block.hpp>
#include <map>

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
                       .q_norm = {},
                       .k_norm = {},
                       .linears = {}};
  for (int p = 0; p < kProjections; ++p) {
    const ModuleShape shape = module_shape(config, static_cast<Projection>(p));
    weights.linears[static_cast<size_t>(p)] = {
        random_normal({shape.rows, shape.columns}, 102 + static_cast<uint64_t>(p)),
        random_normal({shape.rows}, 110 + static_cast<uint64_t>(p))};
  }
  return weights;
}

TEST(RmsNorm, DividesByTheRootMeanSquare) {
  const at::Tensor x = at::tensor({3.0F, 4.0F}).reshape({1, 1, 2});  // mean square 12.5
  const at::Tensor y = kernels::rms_norm(x, at::tensor({1.0F, 2.0F}), 0.0);

  EXPECT_NEAR(y[0][0][0].item<double>(), 3.0 / std::sqrt(12.5), kF32SumError);
  EXPECT_NEAR(y[0][0][1].item<double>(), 8.0 / std::sqrt(12.5), kF32SumError);
}

TEST(RmsNorm, RoundsToBf16BeforeTheProductWithTheWeight) {
  const at::Tensor x = random_normal({1, 3, 8}, 1).to(at::kBFloat16);
  const at::Tensor weight = random_normal({8}, 2).to(at::kBFloat16);

  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor unit = wide / (wide.square().mean(-1, true) + kEps).sqrt();
  // One bf16 rounding of unit (2^-9) may fall on the other side of a tie; two would show as more.
  EXPECT_TRUE(at::allclose(kernels::rms_norm(x, weight, kEps).to(at::kFloat),
                           (weight * unit.to(at::kBFloat16)).to(at::kFloat),
                           /*rtol=*/0x1p-7, /*atol=*/0));
  EXPECT_EQ(kernels::rms_norm(x, weight, kEps).scalar_type(), at::kBFloat16);
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

  const at::Tensor mixed = attend(config, rotary, {}, q, k, v).out;

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

/// A linear of the reference: its input, and its output as a leaf of the graph behind it.
struct Recorded {
  at::Tensor x, output;
};

/// The block written out with differentiable operations; records every linear.
at::Tensor literal_block(const ModelConfig& config, const Rotary& rotary, const BlockWeights& weights,
                         const at::Tensor& x, std::map<Projection, Recorded>& recorded) {
  const auto norm = [&](const at::Tensor& input, const at::Tensor& weight) {
    return input * (input.square().mean(-1, true) + config.rms_eps).rsqrt() * weight;
  };
  const auto linear = [&](Projection p, const at::Tensor& input) {
    const at::Tensor output = at::matmul(input, weights[p].weight.t()) + weights[p].bias;
    recorded[p] = {input, output};
    return output;
  };
  const at::Tensor normed = norm(x, weights.input_norm);
  const at::Tensor q = linear(Projection::q, normed), k = linear(Projection::k, normed),
                   v = linear(Projection::v, normed);
  const at::Tensor middle = x + linear(Projection::o, attend(config, rotary, weights, q, k, v).out);
  const at::Tensor middle_normed = norm(middle, weights.post_attention_norm);
  const at::Tensor gate = linear(Projection::gate, middle_normed), up = linear(Projection::up, middle_normed);
  return middle + linear(Projection::down, gate * gate.sigmoid() * up);
}

TEST(BlockBackward, AgreesWithAutogradAtTheInputAndAtEveryLinear) {
  const ModelConfig config = small_config();
  const Rotary rotary = Rotary::make(config, 6, at::kCPU);
  const BlockWeights weights = random_block(config);
  const at::Tensor leaf = random_normal({2, 6, 8}, 6).requires_grad_(),
                   gradient = random_normal({2, 6, 8}, 10);
  std::map<Projection, Recorded> recorded;
  const at::Tensor expected = literal_block(config, rotary, weights, leaf, recorded);
  std::vector<at::Tensor> inputs{leaf};
  for (const auto& [projection, linear] : recorded) inputs.push_back(linear.output);
  const auto expected_gradients = torch::autograd::grad({expected}, inputs, {gradient});

  BlockActivations activations;
  const at::Tensor y = block_forward(config, rotary, weights, leaf.detach(), &activations);
  std::map<Projection, Recorded> found;
  const at::Tensor x_gradient = block_backward(config, rotary, weights, activations, gradient,
                                               [&](Projection p, const at::Tensor& x, const at::Tensor& g) {
                                                 found[p] = {x, g};
                                               });

  const auto near = [](const at::Tensor& a, const at::Tensor& b) {
    return ((a - b).norm() / b.norm()).item<double>() < kF32SumError;
  };
  EXPECT_TRUE(near(y, expected.detach()));
  EXPECT_TRUE(near(x_gradient, expected_gradients[0]));
  ASSERT_EQ(found.size(), static_cast<size_t>(kProjections));
  size_t i = 1;
  for (const auto& [projection, linear] : recorded) {
    EXPECT_TRUE(near(found[projection].x, linear.x.detach())) << static_cast<int>(projection);
    EXPECT_TRUE(near(found[projection].output, expected_gradients[i++])) << static_cast<int>(projection);
  }
}

TEST(BlockBackward, InBf16StaysNearF32) {
  ModelConfig config = small_config();
  config.d_model = 64;
  config.d_ff = 96;
  config.n_heads = 2;
  config.n_kv_heads = 1;
  config.head_dim = 32;
  const Rotary rotary = Rotary::make(config, 50, at::kCPU);
  BlockWeights wide = random_block(config), narrow = wide;
  for (Linear& linear : wide.linears) linear.weight = linear.weight / 8;  // 1/√fan-in
  const auto bf16 = [](const at::Tensor& t) { return t.to(at::kBFloat16); };
  narrow.input_norm = bf16(wide.input_norm);
  narrow.post_attention_norm = bf16(wide.post_attention_norm);
  for (size_t p = 0; p < wide.linears.size(); ++p)
    narrow.linears[p] = {bf16(wide.linears[p].weight), bf16(wide.linears[p].bias)};
  const at::Tensor x = random_normal({1, 50, 64}, 21), gradient = random_normal({1, 50, 64}, 22);

  const auto run = [&](const BlockWeights& weights, const at::Tensor& input, const at::Tensor& g) {
    BlockActivations activations;
    const at::Tensor y = block_forward(config, rotary, weights, input, &activations);
    const auto ignore = [](Projection, const at::Tensor&, const at::Tensor&) {};
    return std::pair(y.to(at::kFloat),
                     block_backward(config, rotary, weights, activations, g, ignore).to(at::kFloat));
  };
  const auto [y, x_gradient] = run(wide, x, gradient);
  const auto [y_bf16, x_gradient_bf16] = run(narrow, bf16(x), bf16(gradient));
  // A dozen roundings of 2⁻⁹ each on the way.
  constexpr double kBf16Error = 2e-2;
  EXPECT_LT(((y_bf16 - y).norm() / y.norm()).item<double>(), kBf16Error);
  EXPECT_LT(((x_gradient_bf16 - x_gradient).norm() / x_gradient.norm()).item<double>(), kBf16Error);
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
    BlockActivations activations;
    const at::Tensor y = block_forward(config, rotary, weights, input, &activations);
    const auto ignore = [](Projection, const at::Tensor&, const at::Tensor&) {};
    return std::pair(y, block_backward(config, rotary, weights, activations, gradient, ignore));
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

  EXPECT_TRUE(at::equal(block_forward(config, rotary, weights, x),
                        block_forward(config, rotary, weights, x.clone())));
}

}  // namespace
}  // namespace isobath::model
