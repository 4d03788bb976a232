#include <ATen/ATen.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/model/block.hpp>
#include <numbers>

namespace isobath::model {
namespace {

/// f32 [head_dim / 2]. Source: transformers' modeling_rope_utils, Llama 3.1's apply_scaling.
at::Tensor inverse_frequencies(const ModelConfig& config) {
  const auto f32 = at::TensorOptions(at::kFloat);
  const at::Tensor exponents = at::arange(0, config.head_dim, 2, f32) / static_cast<double>(config.head_dim);
  const at::Tensor plain = 1.0 / at::pow(at::Scalar(config.rope.theta), exponents);
  const RopeConfig& rope = config.rope;
  if (rope.type == RopeConfig::Type::standard) return plain;
  if (rope.type == RopeConfig::Type::linear) return plain / rope.factor;

  const auto context = static_cast<double>(rope.original_max_position);
  const double long_wavelength = context / rope.low_frequency_factor;
  const double short_wavelength = context / rope.high_frequency_factor;
  const at::Tensor wavelength = 2.0 * std::numbers::pi / plain;
  const at::Tensor scaled = at::where(wavelength > long_wavelength, plain / rope.factor, plain);
  const at::Tensor smooth = (context / wavelength - rope.low_frequency_factor) /
                            (rope.high_frequency_factor - rope.low_frequency_factor);
  const at::Tensor blended = (1 - smooth) * scaled / rope.factor + smooth * scaled;
  const at::Tensor is_medium = (wavelength >= short_wavelength).logical_and(wavelength <= long_wavelength);
  return at::where(is_medium, blended, scaled);
}

at::Tensor rotate_half(const at::Tensor& x) {
  const int64_t half = x.size(-1) / 2;
  return at::cat({-x.narrow(-1, half, half), x.narrow(-1, 0, half)}, -1);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  return x * cos + rotate_half(x) * sin;
}

/// [b, T, n * head_dim] -> [b, n, T, head_dim], a view.
at::Tensor split_heads(const at::Tensor& x, int64_t head_dim) {
  return x.unflatten(-1, {-1, head_dim}).transpose(1, 2);
}

}  // namespace

Rotary Rotary::make(const ModelConfig& config, int64_t length, c10::Device device) {
  // On the CPU whatever the device, so that all devices rotate by the same angles.
  const at::Tensor positions = at::arange(length, at::TensorOptions(at::kFloat));
  const at::Tensor angles = positions.unsqueeze(1) * inverse_frequencies(config).unsqueeze(0);
  const at::Tensor both_halves = at::cat({angles, angles}, -1);
  return {both_halves.cos().to(device), both_halves.sin().to(device)};
}

at::Tensor apply_linear(const at::Tensor& x, const Linear& linear) {
  return at::linear(x, linear.weight, linear.bias.defined() ? std::optional(linear.bias) : std::nullopt);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps);
  return weight * (wide * scale).to(x.scalar_type());
}

at::Tensor attend(const ModelConfig& config, const Rotary& rotary, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v) {
  const int64_t length = q.size(1);
  ISOBATH_CHECK(length <= rotary.cos.size(0), "rotary embedding of {} positions for {} tokens",
                rotary.cos.size(0), length);
  const at::Tensor cos = rotary.cos.narrow(0, 0, length).to(q.scalar_type());
  const at::Tensor sin = rotary.sin.narrow(0, 0, length).to(q.scalar_type());
  const at::Tensor queries = rotate(split_heads(q, config.head_dim), cos, sin);
  const at::Tensor keys = rotate(split_heads(k, config.head_dim), cos, sin);
  const at::Tensor values = split_heads(v, config.head_dim);
  const at::Tensor mixed = at::scaled_dot_product_attention(
      queries, keys, values, /*attn_mask=*/std::nullopt, /*dropout_p=*/0.0, /*is_causal=*/true,
      /*scale=*/1.0 / std::sqrt(static_cast<double>(config.head_dim)),
      /*enable_gqa=*/config.n_kv_heads != config.n_heads);
  return mixed.transpose(1, 2).flatten(2);
}

at::Tensor gated(const at::Tensor& gate, const at::Tensor& up) {
  return at::silu(gate) * up;
}

at::Tensor block_forward(const ModelConfig& config, const Rotary& rotary, const BlockWeights& weights,
                         const at::Tensor& x, const ApplyLinear& linear) {
  const auto apply = [&](Projection p, const at::Tensor& input) { return linear(p, input, weights[p]); };

  // One statement a linear: arguments of one call would be evaluated in an order of the compiler's choice.
  const at::Tensor normed = rms_norm(x, weights.input_norm, config.rms_eps);
  const at::Tensor q = apply(Projection::q, normed);
  const at::Tensor k = apply(Projection::k, normed);
  const at::Tensor v = apply(Projection::v, normed);
  const at::Tensor middle = x + apply(Projection::o, attend(config, rotary, q, k, v));

  const at::Tensor middle_normed = rms_norm(middle, weights.post_attention_norm, config.rms_eps);
  const at::Tensor gate = apply(Projection::gate, middle_normed);
  const at::Tensor up = apply(Projection::up, middle_normed);
  return middle + apply(Projection::down, gated(gate, up));
}

}  // namespace isobath::model
