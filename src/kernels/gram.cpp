#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/device.hpp>
#include <isobath/kernels/gram.hpp>

#include "amx/gram.hpp"
#include "avx2/product.hpp"
#include "avx512/gram.hpp"
#include "device_gram.hpp"
#include "gram_products.hpp"

namespace isobath::kernels {
namespace {

/// bf16 on AVX-512: both sides of a product read the same pairs of tokens.
struct Bf16Kernel {
  using Scalar = at::BFloat16;
  using Word = uint32_t;
  static constexpr int64_t kPanel = avx512::kGramPanel;
  /// Summed in registers before they meet C: packed panels of so many (24 KiB) stay in the first-level cache.
  static constexpr int64_t kTokensPerPass = 256;
  static constexpr int64_t kChunkTokens = 512;
  using Registers = PlainRegisters;
  static constexpr int64_t panel_size(int64_t n_tokens) { return (n_tokens + 1) / 2 * kPanel; }
  static bool pack(const Scalar* x, int64_t stride, int64_t n_rows, int64_t n_channels, const float* roots,
                   Word* to) {
    return avx512::pack_gram_panel(reinterpret_cast<const uint16_t*>(x), stride, n_rows, n_channels, roots,
                                   to);
  }
  static void add(const Word* rows, const Word* columns, int64_t n_tokens, int64_t n_rows, int64_t n_columns,
                  float* c, int64_t stride) {
    avx512::add_gram_tiles(rows, columns, (n_tokens + 1) / 2, n_rows, n_columns, c, stride);
  }
};

/// bf16 on AMX: left sides read tiles, right sides pairs of tokens.
struct AmxKernel {
  using Scalar = at::BFloat16;
  using Word = uint32_t;
  static constexpr int64_t kPanel = amx::kGramPanel;
  static constexpr int64_t kTokensPerPass = 256;  // 24 KiB a side
  /// Twice as many products for every load and store of C as on AVX-512: large sums come from far away.
  static constexpr int64_t kChunkTokens = 1024;
  using Registers = amx::TileRegisters;
  static constexpr int64_t panel_size(int64_t n_tokens) { return amx::gram_panel_size(n_tokens); }
  static bool pack(const Scalar* x, int64_t stride, int64_t n_rows, int64_t n_channels, const float* roots,
                   Word* to) {
    return amx::pack_gram_panel(reinterpret_cast<const uint16_t*>(x), stride, n_rows, n_channels, roots, to);
  }
  static constexpr auto add = amx::add_gram_tiles;
};

struct F32Kernel {
  using Scalar = float;
  using Word = float;
  static constexpr int64_t kPanel = avx2::kPanel;
  static constexpr int64_t kTokensPerPass = 128;  // 12 KiB
  static constexpr int64_t kChunkTokens = 512;
  using Registers = PlainRegisters;
  static constexpr int64_t panel_size(int64_t n_tokens) { return avx2::gram_panel_size(n_tokens); }
  static constexpr auto pack = avx2::pack_gram_panel;
  static constexpr auto add = avx2::add_gram_tiles;
};

/// function(kernel), the one for x on this machine.
template <class Function>
bool with_kernel(const at::Tensor& x, const Function& function) {
  if (x.scalar_type() != at::kBFloat16) return function(F32Kernel{});
  return has_amx() ? function(AmxKernel{}) : function(Bf16Kernel{});
}

void check_input(const at::Tensor& x, const at::Tensor& roots) {
  ISOBATH_CHECK(has_gram(x) && x.dim() == 2, "this machine has no Gram kernel for such an input");
  ISOBATH_CHECK(!roots.defined() || (roots.numel() == x.size(0) && roots.scalar_type() == at::kFloat &&
                                     roots.device() == x.device()),
                "roots [{}] f32 on {}", x.size(0), x.device().str());
}

void check_sum(const at::Tensor& sum, int64_t n_rows, int64_t n_columns, c10::Device device) {
  ISOBATH_CHECK(sum.dim() == 2 && sum.size(0) == n_rows && sum.size(1) == n_columns && sum.is_contiguous() &&
                    sum.scalar_type() == at::kFloat && sum.device() == device,
                "a contiguous f32 sum [{}, {}] on {} expected", n_rows, n_columns, device.str());
}

}  // namespace

bool has_gram(const at::Tensor& x) {
  if (x.is_cuda())
    return has_device_kernels() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat);
  return x.is_cpu() && implementation_of(x.scalar_type()) != "aten";
}

bool add_gram_panels(std::span<at::Tensor> panels, int64_t begin, const at::Tensor& x,
                     const at::Tensor& roots) {
  check_input(x, roots);
  int64_t end = begin;
  for (const at::Tensor& panel : panels) {
    ISOBATH_CHECK(
        panel.dim() == 2 && end >= 0 && end % kGramAlignment == 0 && end + panel.size(1) <= x.size(1),
        "a panel of columns from {} on of a sum over {} channels", end, x.size(1));
    end += panel.size(1);
    check_sum(panel, end, panel.size(1), x.device());
  }
  if (x.size(0) == 0 || end == begin) return true;
  if (x.is_cuda()) return device::add_gram_panels(panels, begin, x, roots);
  const std::vector<Target> targets = targets_of(panels, begin);
  return with_kernel(x, [&](auto kernel) { return add_gram_as<decltype(kernel)>(targets, x, roots); });
}

bool add_gram(at::Tensor& upper, const at::Tensor& x, const at::Tensor& roots) {
  ISOBATH_CHECK(x.dim() == 2, "x [n, d] expected");
  check_sum(upper, x.size(1), x.size(1), x.device());
  return add_gram_panels({&upper, 1}, 0, x, roots);
}

bool add_product(std::span<at::Tensor> panels, const at::Tensor& a, const at::Tensor& b) {
  check_input(a, {});
  ISOBATH_CHECK(b.dim() == 2 && a.size(0) == b.size(0) && a.scalar_type() == b.scalar_type() &&
                    a.device() == b.device(),
                "add_product needs inputs [n, d] and [n, w] of one dtype on one device");
  int64_t end = 0;
  for (const at::Tensor& panel : panels) {
    ISOBATH_CHECK(panel.dim() == 2 && end % kGramAlignment == 0, "a panel from column {} on", end);
    check_sum(panel, a.size(1), panel.size(1), a.device());
    end += panel.size(1);
  }
  ISOBATH_CHECK(end == b.size(1), "panels of {} columns for {} channels", end, b.size(1));
  if (a.numel() == 0 || end == 0) return true;
  if (a.is_cuda()) return device::add_product(panels, a, b);
  const std::vector<Target> targets = targets_of(panels, 0);
  return with_kernel(a, [&](auto kernel) { return add_product_as<decltype(kernel)>(targets, a, b); });
}

bool add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  return add_product({&sum, 1}, a, b);
}

}  // namespace isobath::kernels
