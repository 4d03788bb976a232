#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/gram.hpp>

#include "avx512/gram.hpp"

namespace isobath::kernels {
namespace {

/// Tokens whose packed panel of 48 channels (24 KiB) stays in the first-level cache.
constexpr int64_t kTokensPerPass = 256;

/// x [n, d] in packed panels, pass by pass: [n_passes, n_panels, kTokensPerPass/2 · kGramPanel] pairs.
struct Packed {
  static constexpr int64_t kPanelSize = kTokensPerPass / 2 * avx512::kGramPanel;

  Packed(const at::Tensor& x, const at::Tensor& roots)
      : n(x.size(0)),
        d(x.size(1)),
        n_panels((d + avx512::kGramPanel - 1) / avx512::kGramPanel),
        n_passes((n + kTokensPerPass - 1) / kTokensPerPass),
        scratch(at::empty({n_passes * n_panels * kPanelSize}, at::kInt)) {
    const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
    const at::Tensor weights = roots.defined() ? roots.contiguous() : roots;
    const auto* from = reinterpret_cast<const uint16_t*>(rows.const_data_ptr<at::BFloat16>());
    const float* root = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
    auto* to = reinterpret_cast<uint32_t*>(scratch.mutable_data_ptr<int32_t>());
    const int64_t stride = rows.stride(0);
    std::atomic<bool> all_finite = true;
    at::parallel_for(0, n_passes * n_panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / n_panels * kTokensPerPass, channel = i % n_panels * avx512::kGramPanel;
        if (!avx512::pack_gram_panel(from + row * stride + channel, stride, std::min(kTokensPerPass, n - row),
                                     channels(i % n_panels), root == nullptr ? nullptr : root + row,
                                     to + i * kPanelSize))
          all_finite = false;
      }
    });
    is_finite = all_finite;
  }
  [[nodiscard]] const uint32_t* panel(int64_t pass, int64_t i) const {
    return reinterpret_cast<const uint32_t*>(scratch.const_data_ptr<int32_t>()) +
           (pass * n_panels + i) * kPanelSize;
  }
  [[nodiscard]] int64_t channels(int64_t i) const {
    return std::min(avx512::kGramPanel, d - i * avx512::kGramPanel);
  }
  [[nodiscard]] int64_t pairs(int64_t pass) const {
    return (std::min(kTokensPerPass, n - pass * kTokensPerPass) + 1) / 2;
  }

  int64_t n, d, n_panels, n_passes;
  at::Tensor scratch;
  bool is_finite = true;
};

/// Adds panel i of `left` against panel j of `right` in one pass to c [d, d].
void add_tiles(const Packed& left, int64_t i, const Packed& right, int64_t j, int64_t pass, float* c) {
  avx512::add_gram_tiles(left.panel(pass, i), right.panel(pass, j), left.pairs(pass), left.channels(i),
                         right.channels(j), c + i * avx512::kGramPanel * right.d + j * avx512::kGramPanel,
                         right.d);
}

void check_sum(const at::Tensor& sum, int64_t d) {
  ISOBATH_CHECK(sum.dim() == 2 && sum.size(0) == d && sum.size(1) == d && sum.is_contiguous() &&
                    sum.scalar_type() == at::kFloat,
                "a contiguous f32 sum [{}, {}] expected", d, d);
}

}  // namespace

bool has_gram(const at::Tensor& x) {
  return has_avx512_bf16() && x.is_cpu() && x.scalar_type() == at::kBFloat16;
}

bool add_gram(at::Tensor& upper, const at::Tensor& x, const at::Tensor& roots) {
  ISOBATH_CHECK(has_gram(x) && x.dim() == 2, "add_gram needs AVX-512 BF16 and x [n, d] bf16");
  check_sum(upper, x.size(1));
  ISOBATH_CHECK(!roots.defined() || (roots.numel() == x.size(0) && roots.scalar_type() == at::kFloat),
                "roots [{}] f32", x.size(0));
  if (x.numel() == 0) return true;
  const Packed packed(x, roots);
  if (!packed.is_finite) return false;
  // Panel j holds j + 1 tiles: one from each end makes equal portions. Passes are added in order, whatever
  // the threads.
  auto* c = upper.mutable_data_ptr<float>();
  at::parallel_for(0, (packed.n_panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    const auto add_panel = [&](int64_t j) {
      for (int64_t pass = 0; pass < packed.n_passes; ++pass)
        for (int64_t i = 0; i <= j; ++i) add_tiles(packed, i, packed, j, pass, c);
    };
    for (int64_t t = begin; t < end; ++t) {
      add_panel(t);
      if (packed.n_panels - 1 - t != t) add_panel(packed.n_panels - 1 - t);
    }
  });
  return true;
}

bool add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  ISOBATH_CHECK(has_gram(a) && has_gram(b) && a.dim() == 2 && a.sizes() == b.sizes(),
                "add_product needs AVX-512 BF16 and two bf16 [n, d]");
  check_sum(sum, a.size(1));
  if (a.numel() == 0) return true;
  const Packed left(a, {}), right(b, {});
  if (!left.is_finite || !right.is_finite) return false;
  auto* c = sum.mutable_data_ptr<float>();
  at::parallel_for(0, right.n_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t pass = 0; pass < left.n_passes; ++pass)
        for (int64_t i = 0; i < left.n_panels; ++i) add_tiles(left, i, right, j, pass, c);
  });
  return true;
}

}  // namespace isobath::kernels
