#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <deque>
#include <isobath/core/error.hpp>
#include <isobath/core/partition.hpp>
#include <isobath/quant/factor.hpp>

/// What the column loops of the host and of a device share.
namespace isobath::quant {

/// Columns between two updates by a matrix product.
inline constexpr int64_t kBlock = 128;

/// How the loop cuts its columns into blocks: they hold whole groups, or lie inside one, so that nothing is
/// pending for the columns of a group when the loop reaches it.
struct ColumnBlocks {
  int64_t n_columns, width;  ///< of a group
  bool is_permuted;          ///< act-order: all grids are fitted before

  /// Whether a group of several blocks starts here, which is fitted as a whole.
  [[nodiscard]] bool starts_wide_group(int64_t column) const {
    return !is_permuted && width > kBlock && column % width == 0;
  }
  [[nodiscard]] int64_t end_of(int64_t begin) const {
    if (is_permuted) return std::min(n_columns, begin + kBlock);
    if (width <= kBlock) return std::min(n_columns, begin + kBlock / width * width);
    return std::min(begin + kBlock, (begin / width + 1) * width);
  }
};

/// Panels of the factor that are still needed: the columns [0, end) of the last one have arrived.
class Panels {
 public:
  void push(const at::Tensor& panel) {
    ISOBATH_CHECK(panel.dim() == 2 && panel.scalar_type() == at::kFloat && panel.is_contiguous() &&
                      panel.size(0) - panel.size(1) == end_,
                  "expected the f32 panel of the columns from {}", end_);
    panels_.push_back({{end_, panel.size(0)}, panel});
    end_ = panel.size(0);
  }
  void drop_before(int64_t column) {
    while (!panels_.empty() && panels_.front().columns.end <= column) panels_.pop_front();
  }
  [[nodiscard]] int64_t end() const { return end_; }

  /// Calls visit(panel's columns that lie in `columns`, those columns of the panel [end, n]).
  template <class Visit>
  void for_each_in(Range columns, const Visit& visit) const {
    for (const Held& held : panels_) {
      const Range part{std::max(columns.begin, held.columns.begin), std::min(columns.end, held.columns.end)};
      if (part.begin >= part.end) continue;
      visit(part, held.panel.slice(1, part.begin - held.columns.begin, part.end - held.columns.begin));
    }
  }

 private:
  struct Held {
    Range columns;
    at::Tensor panel;
  };
  std::deque<Held> panels_;
  int64_t end_ = 0;
};

/// [C] f32, original order, at most 1: the curvature of column j that remains when all later columns
/// compensate. The objective that the loop reaches is ½ Σ_k R_kk² (target_k − ŵ_k)², so this and not H_jj is
/// what a grid should minimise (3 bits, SmolLM2: 1 to 7 % lower objective than H_jj, 1 to 12 % with
/// act-order).
inline at::Tensor remaining_curvature(const Factor& factor) {
  at::Tensor curvature = at::empty_like(factor.curvature);
  curvature.index_copy_(0, factor.order, factor.curvature / factor.curvature.max());
  return curvature.to(at::kFloat);
}

inline bool is_permuted(const at::Tensor& order) {
  const auto* at = order.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < order.numel(); ++i)
    if (at[i] != i) return true;
  return false;
}

}  // namespace isobath::quant
