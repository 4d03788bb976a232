#include "device_gram.hpp"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/device.hpp>

#include "cuda/gram.hpp"

namespace isobath::kernels {
namespace {

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

/// The first channels of x.
template <class Scalar>
cuda::Rows<const Scalar> rows_of(const at::Tensor& x, int64_t n_channels) {
  return {reinterpret_cast<const Scalar*>(x.const_data_ptr()), x.stride(0), x.size(0), n_channels};
}
template <class Scalar>
cuda::Rows<Scalar> rows_to(at::Tensor& x) {
  return {reinterpret_cast<Scalar*>(x.mutable_data_ptr()), x.stride(0), x.size(0), x.size(1)};
}

/// The first n_channels of x [n, d], weighted and rounded; bf16 padded for the product.
at::Tensor weighted(const at::Tensor& x, const at::Tensor& roots, int64_t n_channels, at::Tensor& is_bad) {
  const at::Tensor rows = x.stride(1) == 1 ? x : x.contiguous();
  const at::Tensor root = roots.defined() ? roots.contiguous() : roots;
  const float* from = root.defined() ? root.const_data_ptr<float>() : nullptr;
  const Stream stream = current_stream(x.device());
  auto* bad = is_bad.mutable_data_ptr<int>();
  if (x.scalar_type() == at::kFloat) {
    at::Tensor to = at::empty({x.size(0), n_channels}, x.options());
    check_launch(cuda::weigh_f32(rows_of<float>(rows, n_channels), from, rows_to<float>(to), bad, stream),
                 "weigh");
    return to;
  }
  at::Tensor to = at::empty({round_up(x.size(0), cuda::kTokenStep), round_up(n_channels, cuda::kChannelStep)},
                            x.options());
  check_launch(
      cuda::weigh_bf16(rows_of<uint16_t>(rows, n_channels), from, rows_to<uint16_t>(to), bad, stream),
      "weigh");
  return to;
}

at::Tensor no_bad_value(const at::Tensor& x) {
  return at::zeros({1}, x.options().dtype(at::kInt));
}

/// All rows and columns of a sum whose rows are contiguous; b's channels from `first_column` on meet it.
cuda::Sum all_of(at::Tensor& sum, int64_t first_column) {
  return {.data = sum.mutable_data_ptr<float>(),
          .stride = sum.stride(0),
          .n_rows = sum.size(0),
          .n_columns = sum.size(1),
          .first_column = first_column,
          .is_upper = false};
}

void add(const at::Tensor& a, const at::Tensor& b, const cuda::Sum& sum) {
  const Stream stream = current_stream(a.device());
  const int code =
      a.scalar_type() == at::kFloat
          ? cuda::add_product_f32(rows_of<float>(a, a.size(1)), rows_of<float>(b, b.size(1)), sum, stream)
          : cuda::add_product_bf16(rows_of<uint16_t>(a, a.size(1)), rows_of<uint16_t>(b, b.size(1)), sum,
                                   stream);
  check_launch(code, "the sum of products");
}

}  // namespace

bool device::add_gram_panels(std::span<at::Tensor> panels, int64_t begin, const at::Tensor& x,
                             const at::Tensor& roots) {
  const c10::DeviceGuard guard(x.device());
  at::Tensor is_bad = no_bad_value(x);
  const at::Tensor rows = weighted(x, roots, panels.back().size(0), is_bad);
  if (is_bad.item<int>() != 0) return false;
  for (at::Tensor& panel : panels) {
    add(rows, rows,
        {.data = panel.mutable_data_ptr<float>(),
         .stride = panel.size(1),
         .n_rows = panel.size(0),
         .n_columns = panel.size(1),
         .first_column = begin,
         .is_upper = true});
    begin += panel.size(1);
  }
  return true;
}

bool device::add_product(std::span<at::Tensor> panels, const at::Tensor& a, const at::Tensor& b) {
  const c10::DeviceGuard guard(a.device());
  at::Tensor is_bad = no_bad_value(a);
  const at::Tensor left = weighted(a, {}, a.size(1), is_bad), right = weighted(b, {}, b.size(1), is_bad);
  if (is_bad.item<int>() != 0) return false;
  int64_t begin = 0;
  for (at::Tensor& panel : panels) {
    add(left, right, all_of(panel, begin));
    begin += panel.size(1);
  }
  return true;
}

void add_device_product(at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  const auto is_usable = [&](const at::Tensor& t) {
    return t.dim() == 2 && t.scalar_type() == at::kFloat && t.device() == sum.device() && t.stride(1) == 1;
  };
  ISOBATH_CHECK(is_usable(sum) && is_usable(a) && is_usable(b) && a.size(0) == b.size(0) &&
                    sum.size(0) == a.size(1) && sum.size(1) == b.size(1),
                "f32 rows [{}, {}] += [n, {}]ᵀ [n, {}] on one device", sum.size(0), sum.size(1), a.size(1),
                b.size(1));
  if (a.size(0) == 0 || sum.numel() == 0) return;
  const c10::DeviceGuard guard(sum.device());
  add(a, b, all_of(sum, 0));
}

}  // namespace isobath::kernels
