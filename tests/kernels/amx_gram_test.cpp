// What the AMX kernel packs, skips and adds, with plain loops in place of its tile instructions, on any
// machine. kernels/gram_test.cpp runs the instructions where there are some.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <isobath/kernels/cpu.hpp>
#include <limits>

#include "kernels/gram_cases.hpp"
#include "src/kernels/amx/strips.hpp"
#include "src/kernels/gram_products.hpp"

namespace isobath::kernels {
namespace {

// f32 sums of some hundred products against f64.
constexpr double kSumTolerance = 1e-6;

/// The order of TDPBF16PS. It fuses multiply and add, which are as exact apart: 16 bits hold a product of
/// bf16.
struct StripInPlainLoops {
  std::array<float, amx::kSide * amx::kGramPanel> sums;

  void clear() { sums.fill(0); }
  void multiply_add(const uint32_t* left, const uint32_t* right) {
    for (int64_t i = 0; i < amx::kSide; ++i)
      for (int64_t j = 0; j < amx::kGramPanel; ++j) {
        float first = 0, second = 0;
        for (int64_t pair = 0; pair < amx::kSide; ++pair) {
          const uint32_t a = left[i * amx::kSide + pair], b = right[pair * amx::kGramPanel + j];
          first += std::bit_cast<float>(a << 16) * std::bit_cast<float>(b << 16);
          second += std::bit_cast<float>(a & 0xffff0000) * std::bit_cast<float>(b & 0xffff0000);
        }
        sums[static_cast<size_t>(i * amx::kGramPanel + j)] += first + second;
      }
  }
  void store(float* to) const { std::copy(sums.begin(), sums.end(), to); }
};

struct PlainKernel {
  using Scalar = at::BFloat16;
  using Word = uint32_t;
  static constexpr int64_t kPanel = amx::kGramPanel, kTokensPerPass = 256, kChunkTokens = 1024;
  using Registers = PlainRegisters;
  static constexpr int64_t panel_size(int64_t n_tokens) { return amx::gram_panel_size(n_tokens); }

  /// What avx512::pack_gram_panel does, and the rest as amx::pack_gram_panel.
  static bool pack(const Scalar* x, int64_t stride, int64_t n_rows, int64_t n_channels, const float* roots,
                   Word* to) {
    bool is_usable = true;
    const auto weighted = [&](int64_t row, int64_t channel) -> Word {
      if (row >= n_rows || channel >= n_channels || (roots != nullptr && roots[row] == 0)) return 0;
      const Scalar value = x[row * stride + channel];
      const Scalar found(roots == nullptr ? float{value} : float{value} * roots[row]);
      is_usable = is_usable && std::isfinite(float{found});
      return found.x;
    };
    for (int64_t pair = 0; pair < (n_rows + 1) / 2; ++pair)
      for (int64_t channel = 0; channel < kPanel; ++channel)
        *to++ = weighted(2 * pair, channel) | weighted(2 * pair + 1, channel) << 16;
    amx::complete_panel(to - (n_rows + 1) / 2 * kPanel, n_rows);
    return is_usable;
  }
  static void add(const Word* rows, const Word* columns, int64_t n_tokens, int64_t n_rows, int64_t n_columns,
                  float* c, int64_t stride) {
    amx::add_strips<StripInPlainLoops>(rows, columns, n_tokens, n_rows, n_columns, c, stride);
  }
};

at::Tensor random(at::IntArrayRef shape) {
  return at::randn(shape).to(at::kBFloat16);
}

bool add_plain_gram(at::Tensor& panel, int64_t begin, const at::Tensor& x, const at::Tensor& roots) {
  return add_gram_as<PlainKernel>(targets_of({&panel, 1}, begin), x, roots);
}

TEST(AmxGram, TransposesTiles) {
  std::array<uint32_t, 16 * 20> from{};
  std::array<uint32_t, 16 * 16> to{};
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint32_t>(i);
  amx::transpose(from.data(), 20, to.data());
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 16; ++j) EXPECT_EQ(to[i * 16 + j], from[j * 20 + i]) << i << " " << j;
}

TEST(AmxGram, AddsTheUpperTriangleOfRoundedProducts) {
  at::manual_seed(4);
  for (const int64_t d : {1, 16, 23, 47, 48, 49, 96, 150, 300})
    for (const int64_t n : {1, 2, 31, 32, 33, 255, 256, 257, 700}) {
      const at::Tensor x = random({n, d}), roots = at::rand({n});
      for (const at::Tensor& weights : {at::Tensor(), roots}) {
        at::Tensor upper = at::ones({d, d});
        ASSERT_TRUE(add_plain_gram(upper, 0, x, weights));
        EXPECT_LT(relative(at::triu(upper), at::triu(literal_gram(x, weights) + 1.0)), kSumTolerance)
            << d << " " << n;
      }
    }
}

TEST(AmxGram, AgreesWithTheKernelsOfThisMachine) {
  at::manual_seed(3);
  const at::Tensor x = random({600, 200});
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    if (!has_gram(x.to(dtype))) continue;
    at::Tensor plain = at::zeros({200, 200}), other = at::zeros({200, 200});
    ASSERT_TRUE(add_plain_gram(plain, 0, x, {}));
    ASSERT_TRUE(add_gram(other, x.to(dtype), {}));
    EXPECT_LT(relative(plain.triu(), other.triu()), kSumTolerance) << implementation_of(dtype);
  }
}

TEST(AmxGram, GivesTheSameBitsInPanelsAndOnThreeThreads) {
  at::manual_seed(7);
  constexpr int64_t kChannels = 400;
  const at::Tensor x = random({300, kChannels}), roots = at::rand({300});
  at::Tensor whole = at::ones({kChannels, kChannels});
  ASSERT_TRUE(add_plain_gram(whole, 0, x, roots));
  const int before = at::get_num_threads();
  for (const int n_threads : {1, 3}) {
    at::set_num_threads(n_threads);
    for (const auto& [begin, end] :
         {std::pair<int64_t, int64_t>{0, 48}, {48, 240}, {240, 399}, {144, 400}, {0, 400}}) {
      at::Tensor panel = at::ones({end, end - begin});
      EXPECT_TRUE(add_plain_gram(panel, begin, x, roots));
      const at::Tensor expected = whole.slice(0, 0, end).slice(1, begin, end);
      EXPECT_TRUE(at::equal(at::triu(panel, -begin), at::triu(expected, -begin))) << begin << " " << end;
    }
  }
  at::set_num_threads(before);
}

TEST(AmxGram, AddsProductsAndGivesTheSameBitsInChunks) {
  at::manual_seed(6);
  // The last is packed in chunks of tokens on account of its left side; its first channels alone are not.
  for (const auto& [n, d, w] : {std::tuple{300, 3, 3}, {300, 48, 48}, {300, 130, 50}, {1300, 3400, 20}}) {
    const at::Tensor a = random({n, d}), b = random({n, w + 7}).slice(1, 7);
    at::Tensor sum = at::ones({d, w}), part = at::ones({std::min(d, 600), w});
    ASSERT_TRUE(add_product_as<PlainKernel>(targets_of({&sum, 1}, 0), a, b));
    EXPECT_LT(relative(sum, a.to(at::kDouble).t().mm(b.to(at::kDouble)) + 1.0), kSumTolerance) << d;
    ASSERT_TRUE(add_product_as<PlainKernel>(targets_of({&part, 1}, 0), a.slice(1, 0, part.size(0)), b));
    EXPECT_TRUE(at::equal(part, sum.slice(0, 0, part.size(0)))) << d;
  }
}

TEST(AmxGram, LeavesWhatLiesBesideAPanelAlone) {
  constexpr int64_t kRows = 40, kColumns = 37, kStride = 64, kTokens = 50;
  std::vector<uint32_t> packed(static_cast<size_t>(amx::gram_panel_size(kTokens)));
  std::vector<float> c(kStride * 48, 0);
  const at::Tensor x = at::ones({kTokens, 48}).to(at::kBFloat16);
  ASSERT_TRUE(PlainKernel::pack(x.const_data_ptr<at::BFloat16>(), 48, kTokens, 48, nullptr, packed.data()));
  PlainKernel::add(packed.data(), packed.data(), kTokens, kRows, kColumns, c.data(), kStride);
  for (int64_t i = 0; i < 48; ++i)
    for (int64_t j = 0; j < kStride; ++j)
      ASSERT_EQ(c[static_cast<size_t>(i * kStride + j)], i < kRows && j < kColumns ? kTokens : 0)
          << i << " " << j;
}

TEST(AmxGram, RefusesWhatIsNotFiniteAndLeavesTheSumAlone) {
  at::Tensor x = at::ones({9, 60}).to(at::kBFloat16), upper = at::zeros({60, 60}), roots = at::ones({9});
  x[7][50] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(add_plain_gram(upper, 0, x, roots));
  EXPECT_EQ(upper.abs().max().item<float>(), 0.0F);
  roots[7] = 0;
  EXPECT_TRUE(add_plain_gram(upper, 0, x, roots));
  EXPECT_EQ(upper[0][59].item<float>(), 8.0F);
}

}  // namespace
}  // namespace isobath::kernels
