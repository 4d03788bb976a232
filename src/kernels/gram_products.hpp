#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <isobath/kernels/gram.hpp>
#include <span>
#include <vector>

/// Gram matrices and products on the CPU from packed panels, over a Kernel, the arithmetic of a dtype and
/// target:
///
///     Scalar, Word       of x, and of a packed panel (4 bytes)
///     kPanel             channels of a packed panel; divides kGramAlignment and kBlockChannels
///     kTokensPerPass     tokens that are summed in registers before they meet C
///     kChunkTokens       tokens that are packed at once where x is large; a multiple of kTokensPerPass
///     Registers          what a thread holds while it adds
///     panel_size(n)      words of a panel of n tokens
///     pack, add          as in avx512/gram.hpp, over n tokens
///
/// A sum belongs to one thread, which adds the passes over tokens in order: its bits depend on nothing but
/// the Kernel.
namespace isobath::kernels {

/// Words of x that are packed at once.
inline constexpr int64_t kChunkWords = int64_t{1} << 22;

/// Channels of a block of C that stays in the second-level cache while all tokens of a chunk are added.
inline constexpr int64_t kBlockChannels = 144;

/// Of a Kernel that needs no set-up.
struct PlainRegisters {};

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
    chunk_tokens_ = n * n_widest <= kChunkWords ? n : Kernel::kChunkTokens;
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
  static_assert(kGramAlignment % Kernel::kPanel == 0 && kBlockChannels % Kernel::kPanel == 0);
  static_assert(Kernel::kChunkTokens % Kernel::kTokensPerPass == 0);

  at::Tensor rows_, roots_, scratch_;
  int64_t n_channels_, n_panels_, chunk_tokens_ = 0, first_ = 0, n_tokens_ = 0;
};

/// What a product is added to: columns [first_column, end_column) of it; the first starts a panel.
struct Target {
  float* data;
  int64_t stride, first_column, end_column;
};

/// Sums side by side, from a column on.
inline std::vector<Target> targets_of(std::span<at::Tensor> sums, int64_t begin) {
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
    [[maybe_unused]] const typename Kernel::Registers registers{};
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

}  // namespace isobath::kernels
