#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <isobath/core/error.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/elementwise.hpp>

#include "elementwise_rows.hpp"

namespace isobath::kernels {
namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kValuesPerTask = 16384;  // a multiple of the vector length

template <class Value>
struct ScalarOf;
template <>
struct ScalarOf<float> {
  using Type = float;
};
template <>
struct ScalarOf<uint16_t> {
  using Type = at::BFloat16;
};

template <class Value>
const Value* data(const at::Tensor& tensor) {
  return reinterpret_cast<const Value*>(tensor.const_data_ptr<typename ScalarOf<Value>::Type>());
}
template <class Value>
Value* mutable_data(at::Tensor& tensor) {
  return reinterpret_cast<Value*>(tensor.mutable_data_ptr<typename ScalarOf<Value>::Type>());
}

/// One of the implementations for tensors of one dtype.
enum class Path { aten, f32, bf16 };

Path path_of(std::initializer_list<at::Tensor> inputs) {
  const at::ScalarType dtype = inputs.begin()->scalar_type();
  for (const at::Tensor& input : inputs)
    if (!input.is_cpu() || input.scalar_type() != dtype ||
        (at::GradMode::is_enabled() && input.requires_grad()))
      return Path::aten;
  if (implementation_of(dtype) == "aten") return Path::aten;
  return dtype == at::kBFloat16 ? Path::bf16 : Path::f32;
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

template <class Value>
at::Tensor rms_norm_of(const at::Tensor& x, const at::Tensor& weight, float eps) {
  at::Tensor to = at::empty_like(x);
  const int64_t d = x.size(-1);
  at::parallel_for(0, x.numel() / d, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      ElementwiseRows<Value>::rms_norm(data<Value>(x) + row * d, data<Value>(weight), d, eps,
                                       mutable_data<Value>(to) + row * d);
  });
  return to;
}

template <class Value>
at::Tensor rms_norm_backward_of(const at::Tensor& x, const at::Tensor& weight, float eps,
                                const at::Tensor& gradient, const at::Tensor& residual) {
  at::Tensor to = at::empty_like(x);
  const int64_t d = x.size(-1);
  at::parallel_for(0, x.numel() / d, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      ElementwiseRows<Value>::rms_norm_backward(
          data<Value>(x) + row * d, data<Value>(weight), d, eps, data<Value>(gradient) + row * d,
          residual.defined() ? data<Value>(residual) + row * d : nullptr, mutable_data<Value>(to) + row * d);
  });
  return to;
}

template <class Value>
at::Tensor gated_of(const at::Tensor& gate, const at::Tensor& up) {
  at::Tensor to = at::empty_like(gate);
  for_each_part(gate.numel(), [&](int64_t begin, int64_t end) {
    ElementwiseRows<Value>::gated(data<Value>(gate) + begin, data<Value>(up) + begin, end - begin,
                                  mutable_data<Value>(to) + begin);
  });
  return to;
}

template <class Value>
GatedGradients gated_backward_of(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& gradient) {
  GatedGradients result{at::empty_like(gate), at::empty_like(gate)};
  for_each_part(gate.numel(), [&](int64_t begin, int64_t end) {
    ElementwiseRows<Value>::gated_backward(
        data<Value>(gate) + begin, data<Value>(up) + begin, data<Value>(gradient) + begin, end - begin,
        mutable_data<Value>(result.gate) + begin, mutable_data<Value>(result.up) + begin);
  });
  return result;
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_norm(x, weight);
  const Path path = path_of({x, weight});
  if (path == Path::aten) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
    return weight * (wide * scale).to(x.scalar_type());
  }
  const auto run = path == Path::bf16 ? rms_norm_of<uint16_t> : rms_norm_of<float>;
  return run(x.contiguous(), weight.contiguous(), static_cast<float>(eps));
}

at::Tensor rms_norm_backward(const at::Tensor& x, const at::Tensor& weight, double eps,
                             const at::Tensor& gradient, const at::Tensor& residual) {
  check_norm(x, weight);
  ISOBATH_CHECK(gradient.sizes() == x.sizes() && (!residual.defined() || residual.sizes() == x.sizes()),
                "the gradients of a norm must be shaped as its input");
  const Path path =
      residual.defined() ? path_of({x, weight, gradient, residual}) : path_of({x, weight, gradient});
  if (path == Path::aten) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
    const at::Tensor unit = wide * scale, g = gradient.to(at::kFloat) * weight.to(at::kFloat);
    const at::Tensor own = scale * (g - unit * (g * unit).mean(-1, /*keepdim=*/true));
    return (residual.defined() ? own + residual.to(at::kFloat) : own).to(x.scalar_type());
  }
  const auto run = path == Path::bf16 ? rms_norm_backward_of<uint16_t> : rms_norm_backward_of<float>;
  return run(x.contiguous(), weight.contiguous(), static_cast<float>(eps), gradient.contiguous(),
             residual.defined() ? residual.contiguous() : residual);
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up) {
  ISOBATH_CHECK(gate.sizes() == up.sizes(), "gate and up differ in shape");
  const Path path = path_of({gate, up});
  if (path == Path::aten) return at::silu(gate) * up;
  const auto run = path == Path::bf16 ? gated_of<uint16_t> : gated_of<float>;
  return run(gate.contiguous(), up.contiguous());
}

GatedGradients gated_backward(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& gradient) {
  ISOBATH_CHECK(gate.sizes() == up.sizes() && gate.sizes() == gradient.sizes(),
                "gate, up and gradient differ in shape");
  const Path path = path_of({gate, up, gradient});
  if (path == Path::aten) {
    const at::Tensor g = gate.to(at::kFloat), d = gradient.to(at::kFloat), s = at::sigmoid(g);
    return {(d * up.to(at::kFloat) * s * (1 + g * (1 - s))).to(gate.scalar_type()),
            (d * g * s).to(gate.scalar_type())};
  }
  const auto run = path == Path::bf16 ? gated_backward_of<uint16_t> : gated_backward_of<float>;
  return run(gate.contiguous(), up.contiguous(), gradient.contiguous());
}

}  // namespace isobath::kernels
