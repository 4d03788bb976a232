#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/kernels/linear.hpp>
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

/// The rotary tables of `length` tokens, rounded to the dtype as transformers does.
kernels::AttentionSpec attention_spec(const ModelConfig& config, const Rotary& rotary, const at::Tensor& q) {
  const int64_t length = q.size(1);
  ISOBATH_CHECK(length <= rotary.cos.size(0), "rotary embedding of {} positions for {} tokens",
                rotary.cos.size(0), length);
  const auto rounded = [&](const at::Tensor& table) {
    return table.narrow(0, 0, length).to(q.scalar_type()).to(at::kFloat);
  };
  return {config.n_heads, config.n_kv_heads, config.head_dim, rounded(rotary.cos), rounded(rotary.sin)};
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
  return kernels::linear_forward(x, linear.weight, linear.bias);
}

namespace {

/// RMSNorm of each head of q or k; as it is where the model has none.
at::Tensor norm_heads(const ModelConfig& config, const at::Tensor& x, const at::Tensor& weight) {
  if (!config.head_norms) return x;
  return kernels::rms_norm(x.unflatten(-1, {-1, config.head_dim}), weight, config.rms_eps).flatten(-2);
}

at::Tensor norm_heads_backward(const ModelConfig& config, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& gradient) {
  if (!config.head_norms) return gradient;
  const auto by_head = [&](const at::Tensor& whole) { return whole.unflatten(-1, {-1, config.head_dim}); };
  return kernels::rms_norm_backward(by_head(x), weight, config.rms_eps, by_head(gradient), {}).flatten(-2);
}

/// `attend` behind the norms of heads.
kernels::AttentionOutput attend_normed(const ModelConfig& config, const Rotary& rotary, const at::Tensor& q,
                                       const at::Tensor& k, const at::Tensor& v) {
  const kernels::AttentionSpec spec = attention_spec(config, rotary, q);
  if (kernels::has_attention(spec, q)) return kernels::attention(spec, q, k, v);
  const at::Tensor cos = spec.cos.to(q.scalar_type()), sin = spec.sin.to(q.scalar_type());
  const at::Tensor queries = rotate(split_heads(q, config.head_dim), cos, sin);
  const at::Tensor keys = rotate(split_heads(k, config.head_dim), cos, sin);
  const at::Tensor values = split_heads(v, config.head_dim);
  const at::Tensor mixed = at::scaled_dot_product_attention(
      queries, keys, values, /*attn_mask=*/std::nullopt, /*dropout_p=*/0.0, /*is_causal=*/true,
      /*scale=*/1.0 / std::sqrt(static_cast<double>(config.head_dim)),
      /*enable_gqa=*/config.n_kv_heads != config.n_heads);
  return {mixed.transpose(1, 2).flatten(2), {}};
}

kernels::AttentionGradients attend_normed_backward(const ModelConfig& config, const Rotary& rotary,
                                                   const at::Tensor& q, const at::Tensor& k,
                                                   const at::Tensor& v,
                                                   const kernels::AttentionOutput& forward,
                                                   const at::Tensor& gradient) {
  if (forward.log_sums.defined())
    return kernels::attention_backward(attention_spec(config, rotary, q), q, k, v, forward, gradient);
  const at::AutoGradMode with_grad(true);
  const auto leaf = [](const at::Tensor& x) { return x.detach().requires_grad_(true); };
  const std::vector<at::Tensor> inputs{leaf(q), leaf(k), leaf(v)};
  const at::Tensor out = attend_normed(config, rotary, inputs[0], inputs[1], inputs[2]).out;
  const auto gradients = torch::autograd::grad({out}, inputs, {gradient});
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace

kernels::AttentionOutput attend(const ModelConfig& config, const Rotary& rotary, const BlockWeights& weights,
                                const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return attend_normed(config, rotary, norm_heads(config, q, weights.q_norm),
                       norm_heads(config, k, weights.k_norm), v);
}

kernels::AttentionGradients attend_backward(const ModelConfig& config, const Rotary& rotary,
                                            const BlockWeights& weights, const at::Tensor& q,
                                            const at::Tensor& k, const at::Tensor& v,
                                            const kernels::AttentionOutput& forward,
                                            const at::Tensor& gradient) {
  // The norms are computed again: cheaper than keeping both their input and output.
  kernels::AttentionGradients gradients =
      attend_normed_backward(config, rotary, norm_heads(config, q, weights.q_norm),
                             norm_heads(config, k, weights.k_norm), v, forward, gradient);
  gradients.q = norm_heads_backward(config, q, weights.q_norm, gradients.q);
  gradients.k = norm_heads_backward(config, k, weights.k_norm, gradients.k);
  return gradients;
}

int64_t activation_bytes(const ModelConfig& config, int64_t n_tokens, int64_t element_size) {
  const int64_t q = config.n_heads * config.head_dim, kv = config.n_kv_heads * config.head_dim;
  const int64_t log_sums = config.n_heads * static_cast<int64_t>(sizeof(float));
  return n_tokens * ((2 * q + 2 * kv + config.d_model + 2 * config.d_ff) * element_size + log_sums);
}

at::Tensor block_forward(const ModelConfig& config, const Rotary& rotary, const BlockWeights& weights,
                         const at::Tensor& x, BlockActivations* keep) {
  BlockActivations own;
  BlockActivations& a = keep != nullptr ? *keep : own;
  a.input = x;
  const at::Tensor normed = kernels::rms_norm(x, weights.input_norm, config.rms_eps);
  a.q = apply_linear(normed, weights[Projection::q]);
  a.k = apply_linear(normed, weights[Projection::k]);
  a.v = apply_linear(normed, weights[Projection::v]);
  a.attended = attend(config, rotary, weights, a.q, a.k, a.v);
  a.middle = x + apply_linear(a.attended.out, weights[Projection::o]);
  const at::Tensor middle_normed = kernels::rms_norm(a.middle, weights.post_attention_norm, config.rms_eps);
  a.gate = apply_linear(middle_normed, weights[Projection::gate]);
  a.up = apply_linear(middle_normed, weights[Projection::up]);
  return a.middle + apply_linear(kernels::gated(a.gate, a.up), weights[Projection::down]);
}

at::Tensor block_backward(const ModelConfig& config, const Rotary& rotary, const BlockWeights& weights,
                          const BlockActivations& a, const at::Tensor& gradient,
                          const OnLinearGradient& observe) {
  const at::NoGradGuard no_grad;
  // ∂L/∂x of one linear, and of several that share x.
  const auto through = [&](Projection p, const at::Tensor& g) {
    return kernels::linear_backward(g, weights[p].weight);
  };
  const auto add_through = [&](at::Tensor& sum, Projection p, const at::Tensor& g) {
    kernels::add_linear_backward(sum, g, weights[p].weight);
  };

  observe(Projection::down, kernels::gated(a.gate, a.up), gradient);
  const kernels::GatedGradients inner =
      kernels::gated_backward(a.gate, a.up, through(Projection::down, gradient));
  const at::Tensor middle_normed = kernels::rms_norm(a.middle, weights.post_attention_norm, config.rms_eps);
  observe(Projection::up, middle_normed, inner.up);
  observe(Projection::gate, middle_normed, inner.gate);
  at::Tensor normed_gradient = through(Projection::gate, inner.gate);
  add_through(normed_gradient, Projection::up, inner.up);
  const at::Tensor middle_gradient = kernels::rms_norm_backward(a.middle, weights.post_attention_norm,
                                                                config.rms_eps, normed_gradient, gradient);

  observe(Projection::o, a.attended.out, middle_gradient);
  const kernels::AttentionGradients heads = attend_backward(
      config, rotary, weights, a.q, a.k, a.v, a.attended, through(Projection::o, middle_gradient));
  const at::Tensor normed = kernels::rms_norm(a.input, weights.input_norm, config.rms_eps);
  observe(Projection::v, normed, heads.v);
  observe(Projection::k, normed, heads.k);
  observe(Projection::q, normed, heads.q);
  normed_gradient = through(Projection::q, heads.q);
  add_through(normed_gradient, Projection::k, heads.k);
  add_through(normed_gradient, Projection::v, heads.v);
  return kernels::rms_norm_backward(a.input, weights.input_norm, config.rms_eps, normed_gradient,
                                    middle_gradient);
}

}  // namespace isobath::model
