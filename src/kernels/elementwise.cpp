#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/elementwise.hpp>

#include "avx512/elementwise.hpp"

namespace isobath::kernels {
namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kValuesPerTask = 16384;  // a multiple of the vector length

bool is_fast(const at::Tensor& x) {
  return has_avx512_bf16() && x.is_cpu() && x.scalar_type() == at::kBFloat16 && !x.requires_grad();
}

const uint16_t* data(const at::Tensor& tensor) {
  return reinterpret_cast<const uint16_t*>(tensor.const_data_ptr<at::BFloat16>());
}
uint16_t* mutable_data(at::Tensor& tensor) {
  return reinterpret_cast<uint16_t*>(tensor.mutable_data_ptr<at::BFloat16>());
}

void check_norm(const at::Tensor& x, const at::Tensor& weight) {
  ISOBATH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1),
                "norm of {} channels for x [.., {}]", weight.numel(), x.size(-1));
}

template <typename Function>
void for_each_part(int64_t n, const Function& function) {
  at::parallel_for(0, (n + kValuesPerTask - 1) / kValuesPerTask, 1, [&](int64_t begin, int64_t end) {
    function(begin * kValuesPerTask, std::min(n, end * kValuesPerTask));
  });
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_norm(x, weight);
  if (!is_fast(x)) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
    return weight * (wide * scale).to(x.scalar_type());
  }
  const at::Tensor from = x.contiguous(), scale = weight.contiguous();
  at::Tensor to = at::empty_like(from);
  const int64_t d = x.size(-1);
  at::parallel_for(0, from.numel() / d, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      avx512::rms_norm_row(data(from) + row * d, data(scale), d, static_cast<float>(eps),
                           mutable_data(to) + row * d);
  });
  return to;
}

at::Tensor rms_norm_backward(const at::Tensor& x, const at::Tensor& weight, double eps,
                             const at::Tensor& gradient, const at::Tensor& residual) {
  check_norm(x, weight);
  ISOBATH_CHECK(gradient.sizes() == x.sizes() && (!residual.defined() || residual.sizes() == x.sizes()),
                "the gradients of a norm must be shaped as its input");
  if (!is_fast(x)) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
    const at::Tensor unit = wide * scale, g = gradient.to(at::kFloat) * weight.to(at::kFloat);
    const at::Tensor own = scale * (g - unit * (g * unit).mean(-1, /*keepdim=*/true));
    return (residual.defined() ? own + residual.to(at::kFloat) : own).to(x.scalar_type());
  }
  const at::Tensor from = x.contiguous(), scale = weight.contiguous(), g = gradient.contiguous();
  const at::Tensor rest = residual.defined() ? residual.contiguous() : at::zeros_like(from);
  at::Tensor to = at::empty_like(from);
  const int64_t d = x.size(-1);
  at::parallel_for(0, from.numel() / d, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      avx512::rms_norm_backward_row(data(from) + row * d, data(scale), d, static_cast<float>(eps),
                                    data(g) + row * d, data(rest) + row * d, mutable_data(to) + row * d);
  });
  return to;
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up) {
  ISOBATH_CHECK(gate.sizes() == up.sizes(), "gate and up differ in shape");
  if (!is_fast(gate) || up.requires_grad()) return at::silu(gate) * up;
  const at::Tensor a = gate.contiguous(), b = up.contiguous();
  at::Tensor to = at::empty_like(a);
  for_each_part(a.numel(), [&](int64_t begin, int64_t end) {
    avx512::gated_row(data(a) + begin, data(b) + begin, end - begin, mutable_data(to) + begin);
  });
  return to;
}

GatedGradients gated_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& gradient) {
  ISOBATH_CHECK(gate.sizes() == up.sizes() && gate.sizes() == gradient.sizes(),
                "gate, up and gradient differ in shape");
  if (!is_fast(gate)) {
    const at::Tensor g = gate.to(at::kFloat), d = gradient.to(at::kFloat), s = at::sigmoid(g);
    return {(d * up.to(at::kFloat) * s * (1 + g * (1 - s))).to(gate.scalar_type()),
            (d * g * s).to(gate.scalar_type())};
  }
  const at::Tensor a = gate.contiguous(), b = up.contiguous(), d = gradient.contiguous();
  GatedGradients result{at::empty_like(a), at::empty_like(a)};
  for_each_part(a.numel(), [&](int64_t begin, int64_t end) {
    avx512::gated_backward_row(data(a) + begin, data(b) + begin, data(d) + begin, end - begin,
                               mutable_data(result.gate) + begin, mutable_data(result.up) + begin);
  });
  return result;
}

}  // namespace isobath::kernels
