#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/squares.hpp>

#include "squares_rows.hpp"

namespace isobath::kernels {
namespace {

constexpr int64_t kRowsPerTask = 64, kRowsPerSum = 64;
constexpr int64_t kChannelsPerTask = 64;  // a multiple of the vector length

bool is_fast(const at::Tensor& x) {
  return x.is_cpu() && implementation_of(x.scalar_type()) != "aten";
}

/// Rows side by side or apart, each contiguous.
at::Tensor rows_of(const at::Tensor& x) {
  const at::Tensor rows = x.dim() == 2 ? x : x.flatten(0, -2);
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

template <class Value, class Scalar>
void row_squares_of(const at::Tensor& rows, float* to) {
  const auto* from = reinterpret_cast<const Value*>(rows.const_data_ptr<Scalar>());
  const int64_t stride = rows.stride(0), d = rows.size(1);
  at::parallel_for(0, rows.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = SquaresRows<Value>::sum(from + i * stride, d);
  });
}

template <class Value, class Scalar>
void channel_squares_of(const at::Tensor& rows, const float* weights, double* plain, double* weighted,
                        float* largest) {
  const auto* from = reinterpret_cast<const Value*>(rows.const_data_ptr<Scalar>());
  const int64_t stride = rows.stride(0), n = rows.size(0), d = rows.size(1);
  const int64_t n_tasks = (d + kChannelsPerTask - 1) / kChannelsPerTask;
  at::parallel_for(0, n_tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChannelsPerTask, last = std::min(d, end * kChannelsPerTask);
    for (int64_t i = 0; i < n; i += kRowsPerSum)
      SquaresRows<Value>::channels(from + i * stride + first, stride, weights + i,
                                   std::min(kRowsPerSum, n - i), last - first, plain + first,
                                   weighted + first, largest + first);
  });
}

}  // namespace

at::Tensor row_squares(const at::Tensor& x) {
  ISOBATH_CHECK(x.dim() >= 2, "row_squares of a tensor of {} dimensions", x.dim());
  const c10::NoGradGuard no_grad;
  // The norm reads bf16 and sums in f32 in one pass.
  if (!is_fast(x)) return at::linalg_vector_norm(x, 2, {-1}, false, at::kFloat).square_();
  const at::Tensor rows = rows_of(x);
  at::Tensor sums = at::empty(x.sizes().slice(0, x.dim() - 1), at::kFloat);
  auto* to = sums.mutable_data_ptr<float>();
  if (x.scalar_type() == at::kBFloat16)
    row_squares_of<uint16_t, at::BFloat16>(rows, to);
  else
    row_squares_of<float, float>(rows, to);
  return sums;
}

ChannelSquares channel_squares(const at::Tensor& x, const at::Tensor& weights) {
  ISOBATH_CHECK(x.dim() == 2 && x.size(0) > 0 && weights.dim() == 1 && weights.size(0) == x.size(0) &&
                    weights.scalar_type() == at::kFloat,
                "channel_squares: x [n, d] and weights [n] f32 expected");
  const c10::NoGradGuard no_grad;
  if (!is_fast(x)) {
    const at::Tensor wide = x.to(at::kFloat), squares = wide.square();
    const at::Tensor sums =
        at::mm(at::stack({at::ones_like(weights), weights}), squares).to(at::kCPU, at::kDouble);
    return {sums[0], sums[1], wide.abs().amax(0).cpu()};
  }
  const at::Tensor rows = rows_of(x), each = weights.contiguous();
  ChannelSquares result{at::zeros({x.size(1)}, at::kDouble), at::zeros({x.size(1)}, at::kDouble),
                        at::zeros({x.size(1)}, at::kFloat)};
  auto* plain = result.plain.mutable_data_ptr<double>();
  auto* weighted = result.weighted.mutable_data_ptr<double>();
  auto* largest = result.largest.mutable_data_ptr<float>();
  const auto* weight = each.const_data_ptr<float>();
  if (x.scalar_type() == at::kBFloat16)
    channel_squares_of<uint16_t, at::BFloat16>(rows, weight, plain, weighted, largest);
  else
    channel_squares_of<float, float>(rows, weight, plain, weighted, largest);
  return result;
}

}  // namespace isobath::kernels
