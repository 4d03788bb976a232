#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <isobath/kernels/attention.hpp>

namespace isobath::kernels {
namespace {

// bf16 inputs, probabilities and outputs against f32 throughout: 2⁻⁹ per rounding, over a few of them.
// The gradients of scores are differences of rounded numbers, which a handful of tokens does not average out.
constexpr double kForwardTolerance = 6e-3, kBackwardTolerance = 2.5e-2;
// f32 against f64: sums of some hundred terms, exponentials within 2⁻²¹.
constexpr double kSingleForwardTolerance = 3e-6, kSingleBackwardTolerance = 1e-5;

struct Case {
  at::ScalarType dtype;
  int64_t b, length, n_heads, n_kv_heads, head_dim;
};

at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t half = x.size(-1) / 2;
  return x * cos + at::cat({-x.narrow(-1, half, half), x.narrow(-1, 0, half)}, -1) * sin;
}

/// Literal, in the inputs' dtype: every score, an explicit mask, softmax.
at::Tensor reference(const AttentionSpec& spec, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v) {
  const auto heads = [&](const at::Tensor& x) {
    return x.unflatten(-1, {-1, spec.head_dim}).transpose(1, 2);
  };
  const int64_t length = q.size(1), group = spec.n_heads / spec.n_kv_heads;
  const at::Tensor cos = spec.cos.narrow(0, 0, length).to(q.scalar_type()),
                   sin = spec.sin.narrow(0, 0, length).to(q.scalar_type());
  const at::Tensor queries = rotated(heads(q), cos, sin);
  const at::Tensor keys = rotated(heads(k), cos, sin).repeat_interleave(group, 1);
  const at::Tensor values = heads(v).repeat_interleave(group, 1);
  at::Tensor scores =
      at::matmul(queries, keys.transpose(-1, -2)) / std::sqrt(static_cast<double>(spec.head_dim));
  scores = scores + at::full({length, length}, -INFINITY, q.options()).triu(1);
  return at::matmul(scores.softmax(-1), values).transpose(1, 2).flatten(2);
}

double relative(const at::Tensor& found, const at::Tensor& expected) {
  return ((found.to(at::kDouble) - expected).norm() / expected.norm()).item<double>();
}

class Attention : public ::testing::TestWithParam<Case> {};

TEST_P(Attention, AgreesWithTheLiteralFormForwardAndBackward) {
  const Case c = GetParam();
  at::manual_seed(3);
  const at::Tensor angles = at::rand({c.length + 5, c.head_dim}) * 6.28F;
  const AttentionSpec spec{c.n_heads, c.n_kv_heads, c.head_dim, angles.cos(), angles.sin()};
  const auto random = [&](int64_t heads) {
    return (at::randn({c.b, c.length, heads * c.head_dim}) * 1.5).to(c.dtype);
  };
  const at::Tensor q = random(c.n_heads), k = random(c.n_kv_heads), v = random(c.n_kv_heads),
                   g = random(c.n_heads);
  if (!has_attention(spec, q)) GTEST_SKIP() << "no kernel for this dtype on this machine";

  const at::Tensor qf = q.to(at::kDouble).requires_grad_(), kf = k.to(at::kDouble).requires_grad_(),
                   vf = v.to(at::kDouble).requires_grad_();
  const at::Tensor expected = reference(spec, qf, kf, vf);
  const auto expected_gradients = torch::autograd::grad({expected}, {qf, kf, vf}, {g.to(at::kDouble)});
  const AttentionOutput found = attention(spec, q, k, v);
  const AttentionGradients gradients = attention_backward(spec, q, k, v, found, g);
  const bool is_single = c.dtype == at::kFloat;
  const double backward_tolerance = is_single ? kSingleBackwardTolerance : kBackwardTolerance;
  EXPECT_LT(relative(found.out, expected.detach()), is_single ? kSingleForwardTolerance : kForwardTolerance);
  EXPECT_LT(relative(gradients.q, expected_gradients[0]), backward_tolerance);
  EXPECT_LT(relative(gradients.k, expected_gradients[1]), backward_tolerance);
  EXPECT_LT(relative(gradients.v, expected_gradients[2]), backward_tolerance);
  EXPECT_EQ(found.log_sums.sizes(), (at::IntArrayRef{c.b, c.n_heads, c.length}));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    all.insert(all.end(), {{dtype, 1, 2, 1, 1, 32},
                           {dtype, 1, 7, 2, 1, 32},
                           {dtype, 2, 48, 3, 1, 64},
                           {dtype, 1, 97, 4, 2, 64},
                           {dtype, 1, 257, 2, 2, 128},
                           {dtype, 1, 600, 3, 1, 64}});
  }
  all.push_back({at::kFloat, 1, 145, 2, 1, 48});
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, Attention, ::testing::ValuesIn(cases()));

class AttentionRange : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(AttentionRange, SurvivesLargeScores) {
  const AttentionSpec spec{1, 1, 32, {}, {}};
  const at::Tensor q = at::full({1, 40, 32}, 100.0).to(GetParam());
  if (!has_attention(spec, q)) GTEST_SKIP() << "no kernel for this dtype on this machine";
  at::manual_seed(1);
  const at::Tensor v = at::randn({1, 40, 32}).to(GetParam());
  // All scores equal: the mean of the values so far.
  const at::Tensor mean = v.to(at::kFloat).cumsum(1) / at::arange(1, 41).unsqueeze(1);
  EXPECT_LT(relative(attention(spec, q, q, v).out, mean), kForwardTolerance);
  // One key far above the others takes all the weight, one far below none.
  at::Tensor k = at::zeros({1, 40, 32}).to(GetParam());
  k[0][3].fill_(100.0);
  EXPECT_LT(relative(attention(spec, q, k, v).out[0].slice(0, 3), v.to(at::kFloat)[0][3].expand({37, 32})),
            kForwardTolerance);
}

TEST_P(AttentionRange, HidesNoNaN) {
  const AttentionSpec spec{1, 1, 32, {}, {}};
  at::Tensor q = at::ones({1, 300, 32}).to(GetParam());
  if (!has_attention(spec, q)) GTEST_SKIP() << "no kernel for this dtype on this machine";
  const at::Tensor k = q.clone();
  q[0][200][3] = NAN;
  const AttentionOutput found = attention(spec, q, k, k);
  EXPECT_TRUE(found.out[0][200].isnan().all().item<bool>());
  EXPECT_FALSE(found.out[0][199].isnan().any().item<bool>());
  EXPECT_TRUE(found.log_sums[0][0][200].isnan().item<bool>());
}

INSTANTIATE_TEST_SUITE_P(Dtypes, AttentionRange, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace isobath::kernels
