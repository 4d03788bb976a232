#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <isobath/core/error.hpp>
#include <isobath/core/partition.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/device.hpp>
#include <isobath/kernels/gram.hpp>
#include <vector>

#include "avx2/product.hpp"
#include "avx512/gram.hpp"
#include "device_gram.hpp"

namespace isobath::kernels {
namespace {

/// Words of x that are packed at once; more tokens follow in chunks of whole passes.
constexpr int64_t kChunkWords = int64_t{1} << 22;
constexpr int64_t kChunkTokens = 512;

/// Channels of a block of C that stays in the second-level cache while all tokens of a chunk are added.
constexpr int64_t kBlockChannels = 144;

/// bf16 on AVX-512: both sides of a product read the same pairs of tokens.
struct Bf16Kernel {
  using Scalar = at::BFloat16;
  using Word = uint32_t;
  static constexpr int64_t kPanel = avx512::kGramPanel;
  /// Summed in registers before they meet C: packed panels of so many (24 KiB) stay in the first-level cache.
  static constexpr int64_t kTokensPerPass = 256;
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

struct F32Kernel {
  using Scalar = float;
  using Word = float;
  static constexpr int64_t kPanel = avx2::kPanel;
  static constexpr int64_t kTokensPerPass = 128;  // 12 KiB
  static constexpr int64_t panel_size(int64_t n_tokens) { return avx2::gram_panel_size(n_tokens); }
  static constexpr auto pack = avx2::pack_gram_panel;
  static constexpr auto add = avx2::add_gram_tiles;
};

static_assert(kGramAlignment % Bf16Kernel::kPanel == 0 && kGramAlignment % F32Kernel::kPanel == 0);
static_assert(kBlockChannels % Bf16Kernel::kPanel == 0 && kBlockChannels % F32Kernel::kPanel == 0);

/// A chunk of tokens of x [n, d] in packed panels: [n_passes, n_panels, panel].
template <class Kernel>
class Packed {
 public:
  /// Of the first n_channels of x; the tokens of a chunk are as many as fit of n_widest channels.
  Packed(const at::Tensor& x, const at::Tensor& roots, int64_t n_channels, int64_t n_widest)
      : rows_(x.stride(1) == 1 ? x : x.contiguous()),
        roots_(roots.defined() ? roots.contiguous() : roots),
        n_channels_(n_channels),
        n_panels_((n_channels + Kernel::kPanel - 1) / Kernel::kPanel) {
    const int64_t n = x.size(0);
    chunk_tokens_ = n * n_widest <= kChunkWords ? n : kChunkTokens;
    const int64_t n_passes =
        (std::min(n, chunk_tokens_) + Kernel::kTokensPerPass - 1) / Kernel::kTokensPerPass;
    scratch_ = at::empty({n_passes * n_panels_ * kPanelSize}, at::kFloat);
  }

  [[nodiscard]] int64_t n_chunks() const { return (rows_.size(0) + chunk_tokens_ - 1) / chunk_tokens_; }

  /// Packs one chunk in place of the one before; false when a value may not be used.
  [[nodiscard]] bool pack(int64_t chunk) {
    first_ = chunk * chunk_tokens_;
    n_tokens_ = std::min(chunk_tokens_, rows_.size(0) - first_);
    const auto* from = rows_.const_data_ptr<typename Kernel::Scalar>();
    const float* root = roots_.defined() ? roots_.const_data_ptr<float>() : nullptr;
    auto* to = reinterpret_cast<typename Kernel::Word*>(scratch_.mutable_data_ptr<float>());
    const int64_t stride = rows_.stride(0);
    std::atomic<bool> all_usable = true;
    at::parallel_for(0, n_passes() * n_panels_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pass = i / n_panels_, panel = i % n_panels_;
        const int64_t row = first_ + pass * Kernel::kTokensPerPass;
        if (!Kernel::pack(from + row * stride + panel * Kernel::kPanel, stride, tokens(pass), channels(panel),
                          root == nullptr ? nullptr : root + row, to + i * kPanelSize))
          all_usable = false;
      }
    });
    return all_usable;
  }

  [[nodiscard]] const typename Kernel::Word* panel(int64_t pass, int64_t i) const {
    return reinterpret_cast<const typename Kernel::Word*>(scratch_.const_data_ptr<float>()) +
           (pass * n_panels_ + i) * kPanelSize;
  }
  [[nodiscard]] int64_t n_panels() const { return n_panels_; }
  [[nodiscard]] int64_t n_passes() const {
    return (n_tokens_ + Kernel::kTokensPerPass - 1) / Kernel::kTokensPerPass;
  }
  [[nodiscard]] int64_t tokens(int64_t pass) const {
    return std::min(Kernel::kTokensPerPass, n_tokens_ - pass * Kernel::kTokensPerPass);
  }
  [[nodiscard]] int64_t channels(int64_t i) const {
    return std::min(Kernel::kPanel, n_channels_ - i * Kernel::kPanel);
  }

 private:
  static constexpr int64_t kPanelSize = Kernel::panel_size(Kernel::kTokensPerPass);
  static_assert(sizeof(typename Kernel::Word) == sizeof(float));

  at::Tensor rows_, roots_, scratch_;
  int64_t n_channels_, n_panels_, chunk_tokens_ = 0, first_ = 0, n_tokens_ = 0;
};

/// What a product is added to: columns [first_column, end_column) of it; the first starts a panel.
struct Target {
  float* data;
  int64_t stride, first_column, end_column;
};

/// Sums side by side, from a column on.
std::vector<Target> targets_of(std::span<at::Tensor> sums, int64_t begin) {
  std::vector<Target> targets;
  for (at::Tensor& sum : sums) {
    const int64_t end = begin + sum.size(1);
    targets.push_back({sum.mutable_data_ptr<float>(), sum.size(1), begin, end});
    begin = end;
  }
  return targets;
}

enum class Part { upper, all };

/// Adds the products of one packed chunk, the columns of the targets against `rows`.
template <class Kernel>
void add_products(const Packed<Kernel>& rows, const Packed<Kernel>& columns,
                  const std::vector<Target>& targets, Part part) {
  constexpr int64_t kBlock = kBlockChannels / Kernel::kPanel;
  struct Block {
    const Target* target;
    int64_t row, column, column_end;  // packed panels
  };
  std::vector<Block> blocks;
  for (const Target& target : targets) {
    const int64_t last = (target.end_column + Kernel::kPanel - 1) / Kernel::kPanel;
    for (int64_t j = target.first_column / Kernel::kPanel; j < last; j += kBlock) {
      const int64_t end = part == Part::upper ? std::min(j + kBlock, last) : rows.n_panels();
      for (int64_t i = 0; i < end; i += kBlock) blocks.push_back({&target, i, j, std::min(j + kBlock, last)});
    }
  }
  const auto add_block = [&](const Block& block) {
    const Target& c = *block.target;
    const int64_t row_end = std::min(block.row + kBlock, rows.n_panels());
    for (int64_t pass = 0; pass < rows.n_passes(); ++pass)
      for (int64_t j = block.column; j < block.column_end; ++j) {
        const int64_t end = part == Part::upper ? std::min(row_end, j + 1) : row_end;
        for (int64_t i = block.row; i < end; ++i)
          Kernel::add(rows.panel(pass, i), columns.panel(pass, j), rows.tokens(pass), rows.channels(i),
                      columns.channels(j),
                      c.data + i * Kernel::kPanel * c.stride + j * Kernel::kPanel - c.first_column, c.stride);
      }
  };
  // A block of C belongs to one thread, which adds the passes in order.
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) add_block(blocks[static_cast<size_t>(b)]);
  });
}

/// Whether every chunk of x may be used. The last one stays packed.
template <class Kernel>
bool is_usable(Packed<Kernel>& x) {
  for (int64_t chunk = 0; chunk < x.n_chunks(); ++chunk)
    if (!x.pack(chunk)) return false;
  return true;
}

template <class Kernel>
bool add_gram_as(const std::vector<Target>& targets, const at::Tensor& x, const at::Tensor& roots) {
  const int64_t n_channels = targets.back().end_column;
  Packed<Kernel> packed(x, roots, n_channels, n_channels);
  if (!is_usable(packed)) return false;
  for (int64_t chunk = 0; chunk < packed.n_chunks(); ++chunk) {
    // Large matrices only, where packing twice costs nothing beside the product.
    if (packed.n_chunks() > 1) (void)packed.pack(chunk);
    add_products(packed, packed, targets, Part::upper);
  }
  return true;
}

template <class Kernel>
bool add_product_as(const std::vector<Target>& targets, const at::Tensor& a, const at::Tensor& b) {
  const int64_t widest = std::max(a.size(1), b.size(1));
  Packed<Kernel> left(a, {}, a.size(1), widest), right(b, {}, b.size(1), widest);
  if (!is_usable(left) || !is_usable(right)) return false;
  for (int64_t chunk = 0; chunk < left.n_chunks(); ++chunk) {
    if (left.n_chunks() > 1) {
      (void)left.pack(chunk);
      (void)right.pack(chunk);
    }
    add_products(left, right, targets, Part::all);
  }
  return true;
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

bool is_bf16(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16;
}

}  // namespace

bool has_gram(const at::Tensor& x) {
  if (x.is_cuda()) return has_device_kernels() && (is_bf16(x) || x.scalar_type() == at::kFloat);
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
  return is_bf16(x) ? add_gram_as<Bf16Kernel>(targets, x, roots) : add_gram_as<F32Kernel>(targets, x, roots);
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
  return is_bf16(a) ? add_product_as<Bf16Kernel>(targets, a, b) : add_product_as<F32Kernel>(targets, a, b);
}

bool add_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  return add_product({&sum, 1}, a, b);
}

}  // namespace isobath::kernels
