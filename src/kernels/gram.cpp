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

}  // namespace

bool has_gram(const at::Tensor& x) {
  return has_avx512_bf16() && x.is_cpu() && x.scalar_type() == at::kBFloat16;
}

bool add_gram(at::Tensor& upper, const at::Tensor& x, const at::Tensor& roots) {
  using avx512::kGramPanel;
  ISOBATH_CHECK(has_gram(x) && x.dim() == 2, "add_gram needs AVX-512 BF16 and x [n, d] bf16");
  const int64_t n = x.size(0), d = x.size(1);
  ISOBATH_CHECK(upper.dim() == 2 && upper.size(0) == d && upper.size(1) == d && upper.is_contiguous() &&
                    upper.scalar_type() == at::kFloat,
                "add_gram needs a contiguous f32 [{}, {}]", d, d);
  ISOBATH_CHECK(!roots.defined() || (roots.numel() == n && roots.scalar_type() == at::kFloat),
                "roots [{}] f32", n);
  if (n == 0 || d == 0) return true;
  const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  const at::Tensor weights = roots.defined() ? roots.contiguous() : roots;
  const auto* from = reinterpret_cast<const uint16_t*>(rows.const_data_ptr<at::BFloat16>());
  const float* root = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  const int64_t stride = rows.stride(0), n_panels = (d + kGramPanel - 1) / kGramPanel;
  const int64_t n_passes = (n + kTokensPerPass - 1) / kTokensPerPass;
  const int64_t panel_size = kTokensPerPass / 2 * kGramPanel;
  const at::Tensor scratch = at::empty({n_passes * n_panels * panel_size}, at::kInt);
  auto* packed = reinterpret_cast<uint32_t*>(scratch.mutable_data_ptr<int32_t>());

  std::atomic<bool> is_finite = true;
  at::parallel_for(0, n_passes * n_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / n_panels * kTokensPerPass, channel = i % n_panels * kGramPanel;
      if (!avx512::pack_gram_panel(from + row * stride + channel, stride, std::min(kTokensPerPass, n - row),
                                   std::min(kGramPanel, d - channel), root == nullptr ? nullptr : root + row,
                                   packed + i * panel_size))
        is_finite = false;
    }
  });
  if (!is_finite) return false;

  // Panel j holds j + 1 tiles: one from each end makes equal portions. Passes are added in order, whatever
  // the threads.
  auto* c = upper.mutable_data_ptr<float>();
  at::parallel_for(0, (n_panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    const auto add_panel = [&](int64_t j) {
      for (int64_t pass = 0; pass < n_passes; ++pass) {
        const uint32_t* panels = packed + pass * n_panels * panel_size;
        const int64_t n_pairs = (std::min(kTokensPerPass, n - pass * kTokensPerPass) + 1) / 2;
        for (int64_t i = 0; i <= j; ++i)
          avx512::add_gram_tiles(panels + i * panel_size, panels + j * panel_size, n_pairs,
                                 std::min(kGramPanel, d - i * kGramPanel),
                                 std::min(kGramPanel, d - j * kGramPanel),
                                 c + i * kGramPanel * d + j * kGramPanel, d);
      }
    };
    for (int64_t t = begin; t < end; ++t) {
      add_panel(t);
      if (n_panels - 1 - t != t) add_panel(n_panels - 1 - t);
    }
  });
  return true;
}

}  // namespace isobath::kernels
