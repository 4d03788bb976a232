#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <isobath/core/error.hpp>
#include <isobath/core/partition.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/linear.hpp>

#include "avx2/product.hpp"

namespace isobath::kernels {
namespace {

using avx2::kPanel;

/// Steps summed in registers before they meet C: a packed panel of them (12 KiB) stays in the first-level
/// cache.
constexpr int64_t kStepsPerPass = 128;

/// Columns of C whose packed weights (48 KiB) stay in the second-level cache while all rows pass.
constexpr int64_t kBlockColumns = 4 * kPanel;

/// Tasks for each thread, so that none waits long for the last; a task has at least so many panels of rows,
/// or packing its weights would count.
constexpr int64_t kTasksPerThread = 4, kLeastRowPanels = 8;

/// Words of x that are packed at once, where that is more than one pass.
constexpr int64_t kChunkWords = int64_t{1} << 22;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

bool is_fast(const at::Tensor& x, const at::Tensor& weight) {
  const bool records = c10::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad());
  const bool fits = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16;
  return has_avx2() && x.is_cpu() && x.scalar_type() == at::kFloat && weight.is_cpu() && fits && !records;
}

/// How W enters: y_j = Σ_k x_k W[j, k], or Σ_k x_k W[k, j].
enum class Side { transposed, straight };

template <class Value>
void pack_weight(const Value* weight, int64_t stride, Side side, int64_t first_step, int64_t n_steps,
                 int64_t first_column, int64_t n_columns, float* to) {
  if (side == Side::transposed)
    avx2::pack_columns(weight + first_column * stride + first_step, stride, n_steps, n_columns, to);
  else
    avx2::pack_columns_of_rows(weight + first_step * stride + first_column, stride, n_steps, n_columns, to);
}

/// c [n_rows, n_columns] = x [n_rows, n_steps] times W, or += with `accumulate`.
template <class Value>
void multiply(const at::Tensor& x, const Value* weight, int64_t weight_stride, Side side, at::Tensor& c,
              bool accumulate) {
  const int64_t n_rows = x.size(0), n_steps = x.size(1), n_columns = c.size(1);
  const int64_t n_row_panels = ceil_div(n_rows, kPanel);
  const int64_t passes_per_chunk =
      std::max<int64_t>(1, kChunkWords / (n_row_panels * kPanel * kStepsPerPass));
  const int64_t n_passes = ceil_div(n_steps, kStepsPerPass);
  constexpr int64_t kPanelSize = kPanel * kStepsPerPass;
  at::Tensor packed =
      at::empty({std::min(passes_per_chunk, n_passes) * n_row_panels * kPanelSize}, at::kFloat);
  const auto* from = x.const_data_ptr<float>();
  auto* rows = packed.mutable_data_ptr<float>();
  auto* to = c.mutable_data_ptr<float>();
  const auto steps_of = [&](int64_t pass) { return std::min(kStepsPerPass, n_steps - pass * kStepsPerPass); };
  // Narrow matrices are cut in rows too.
  const int64_t n_blocks = ceil_div(n_columns, kBlockColumns), n_threads = at::get_num_threads();
  const int64_t n_parts = n_threads == 1
                              ? 1
                              : std::clamp<int64_t>(kTasksPerThread * n_threads / n_blocks, 1,
                                                    std::max<int64_t>(1, n_row_panels / kLeastRowPanels));

  for (int64_t first_pass = 0; first_pass < n_passes; first_pass += passes_per_chunk) {
    const int64_t end_pass = std::min(n_passes, first_pass + passes_per_chunk);
    at::parallel_for(0, (end_pass - first_pass) * n_row_panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t pass = first_pass + p / n_row_panels, row = p % n_row_panels * kPanel;
        avx2::pack_rows(from + row * x.stride(0) + pass * kStepsPerPass, x.stride(0), steps_of(pass),
                        std::min(kPanel, n_rows - row), rows + p * kPanelSize);
      }
    });
    // A part of the rows of a block of columns belongs to one thread, which adds the passes in order.
    at::parallel_for(0, n_blocks * n_parts, 1, [&](int64_t begin, int64_t end) {
      at::Tensor scratch = at::empty({kBlockColumns / kPanel * kPanelSize}, at::kFloat);
      auto* columns = scratch.mutable_data_ptr<float>();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / n_parts * kBlockColumns,
                      last = std::min(n_columns, first + kBlockColumns);
        const Range panels = partition(n_row_panels, n_parts, task % n_parts);
        for (int64_t pass = first_pass; pass < end_pass; ++pass) {
          for (int64_t j = first; j < last; j += kPanel)
            pack_weight(weight, weight_stride, side, pass * kStepsPerPass, steps_of(pass), j,
                        std::min(kPanel, n_columns - j), columns + (j - first) * kStepsPerPass);
          for (int64_t i = panels.begin; i < panels.end; ++i)
            for (int64_t j = first; j < last; j += kPanel)
              avx2::multiply_panels(rows + ((pass - first_pass) * n_row_panels + i) * kPanelSize,
                                    columns + (j - first) * kStepsPerPass, steps_of(pass),
                                    std::min(kPanel, n_rows - i * kPanel), std::min(kPanel, n_columns - j),
                                    to + i * kPanel * n_columns + j, n_columns, accumulate || pass > 0);
        }
      }
    });
  }
}

/// c = x W or x Wᵀ (or +=) for x [.., n_steps], c [.., n_columns] contiguous.
void multiply(const at::Tensor& x, const at::Tensor& weight, Side side, at::Tensor& c, bool accumulate) {
  const at::Tensor rows = x.reshape({-1, x.size(-1)}).contiguous(), w = weight.contiguous();
  at::Tensor flat = c.view({-1, c.size(-1)});
  if (flat.numel() == 0) return;
  if (w.scalar_type() == at::kBFloat16)
    multiply(rows, reinterpret_cast<const uint16_t*>(w.const_data_ptr<at::BFloat16>()), w.size(1), side, flat,
             accumulate);
  else
    multiply(rows, w.const_data_ptr<float>(), w.size(1), side, flat, accumulate);
}

at::Tensor empty_like_rows(const at::Tensor& x, int64_t n_columns) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = n_columns;
  return at::empty(sizes, x.options());
}

}  // namespace

at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  ISOBATH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1),
                "a linear of {} inputs given x [.., {}]", weight.size(-1), x.size(-1));
  if (!is_fast(x, weight))
    return at::linear(x, weight.to(x.scalar_type()),
                      bias.defined() ? std::optional(bias.to(x.scalar_type())) : std::nullopt);
  at::Tensor y = empty_like_rows(x, weight.size(0));
  if (bias.defined()) y.copy_(bias.expand_as(y));
  multiply(x, weight, Side::transposed, y, bias.defined());
  return y;
}

at::Tensor linear_backward(const at::Tensor& gradient, const at::Tensor& weight) {
  ISOBATH_CHECK(gradient.dim() >= 1 && weight.dim() == 2 && weight.size(0) == gradient.size(-1),
                "a linear of {} outputs given a gradient [.., {}]", weight.size(0), gradient.size(-1));
  if (!is_fast(gradient, weight)) return at::matmul(gradient, weight.to(gradient.scalar_type()));
  at::Tensor sum = empty_like_rows(gradient, weight.size(1));
  multiply(gradient, weight, Side::straight, sum, false);
  return sum;
}

void add_linear_backward(at::Tensor& sum, const at::Tensor& gradient, const at::Tensor& weight) {
  ISOBATH_CHECK(sum.is_contiguous() && sum.size(-1) == weight.size(1) && gradient.size(-1) == weight.size(0),
                "gradients [.., {}] and [.., {}] of a linear [{}, {}]", sum.size(-1), gradient.size(-1),
                weight.size(0), weight.size(1));
  if (is_fast(gradient, weight)) return multiply(gradient, weight, Side::straight, sum, true);
  sum.view({-1, sum.size(-1)})
      .addmm_(gradient.reshape({-1, gradient.size(-1)}), weight.to(gradient.scalar_type()));
}

}  // namespace isobath::kernels
