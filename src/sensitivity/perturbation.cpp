#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <isobath/core/error.hpp>
#include <isobath/sensitivity/perturbation.hpp>

#include "probe_signs.hpp"

namespace isobath::sensitivity {
namespace {

// Fixed, so that the products have the same shapes on every rank count; a tile of 512 rows stays near the
// cache.
constexpr int64_t kTileRows = 512;

at::Tensor zero_padding(const at::Tensor& values, const at::Tensor& mask) {
  return mask.defined() ? values.masked_fill(mask.to(values.device()).logical_not().unsqueeze(-1), 0.0)
                        : values;
}

void check_shapes(const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask,
                  const at::Tensor& token_weights) {
  ISOBATH_CHECK(x.dim() == 3 && gradient.dim() == 3 && x.sizes().slice(0, 2) == gradient.sizes().slice(0, 2),
                "x [b, T, d_in] and gradient [b, T, d_out] expected");
  ISOBATH_CHECK(!mask.defined() || mask.sizes() == x.sizes().slice(0, 2), "mask [{}, {}] expected", x.size(0),
                x.size(1));
  ISOBATH_CHECK(token_weights.sizes() == x.sizes().slice(0, 2), "token weights [{}, {}] expected", x.size(0),
                x.size(1));
}

}  // namespace

PerturbationScores perturbation_scores(const at::Tensor& x_in, const at::Tensor& gradient_in,
                                       const at::Tensor& mask, const at::Tensor& token_weights,
                                       int64_t n_candidates, const PerturbationRows& rows_of,
                                       const ProbeKey& key) {
  check_shapes(x_in, gradient_in, mask, token_weights);
  const c10::NoGradGuard no_grad;
  const at::Tensor x = zero_padding(x_in, mask), gradient = zero_padding(gradient_in, mask);
  const int64_t n_sequences = x.size(0), d_in = x.size(2), d_out = gradient.size(2);
  const int64_t n_directions = n_candidates * key.n_probes;
  const auto f64 = x.options().dtype(at::kDouble);
  at::Tensor first_order = at::zeros({n_sequences, n_candidates}, f64), norm = at::zeros({n_sequences}, f64);

  const CounterRandom random(key.seed, RandomPurpose::probe_sign);
  std::vector<at::Tensor> signs;
  for (int64_t s = 0; s < n_sequences; ++s)
    signs.push_back(
        probe_signs(random, key.first_sequence + s, key.sample, key.n_probes, d_out).to(x.device()));
  // directions[s][k·P + p] = ΔW_kᵀ r_p, summed over the row tiles.
  at::Tensor directions = at::zeros({n_sequences, n_directions, d_in}, x.options().dtype(at::kFloat));
  for (int64_t begin = 0; begin < d_out; begin += kTileRows) {
    const Range rows{begin, std::min(begin + kTileRows, d_out)};
    std::vector<at::Tensor> products;  // rows of GᵀX of each sequence
    for (int64_t s = 0; s < n_sequences; ++s) {
      products.push_back(at::mm(gradient[s].slice(1, rows.begin, rows.end).t(), x[s]).to(at::kFloat));
      norm[s].add_(products.back().square().sum(at::kDouble));
    }
    for (int64_t k = 0; k < n_candidates; ++k) {
      const at::Tensor delta = rows_of(k, rows);
      for (int64_t s = 0; s < n_sequences; ++s) {
        first_order[s][k].add_((products[static_cast<size_t>(s)] * delta).sum(at::kDouble));
        at::Tensor part = directions[s].slice(0, k * key.n_probes, (k + 1) * key.n_probes);
        part.addmm_(signs[static_cast<size_t>(s)].slice(1, rows.begin, rows.end), delta);
      }
    }
  }
  PerturbationScores scores{.first_order = first_order.cpu(),
                            .output_change = at::empty({n_sequences, n_candidates}, at::kDouble),
                            .weighted_change = at::empty({n_sequences, n_candidates}, at::kDouble),
                            .gradient_norm = norm.cpu()};
  for (int64_t s = 0; s < n_sequences; ++s) {
    const at::Tensor energy = at::mm(directions[s], x[s].to(at::kFloat).t())
                                  .square()
                                  .view({n_candidates, key.n_probes, x.size(1)})
                                  .mean(1);  // [K, T]: estimates of ‖ΔW x_i‖²
    scores.output_change[s].copy_(energy.sum(1, false, at::kDouble));
    scores.weighted_change[s].copy_(
        (energy * token_weights[s].to(energy.device())).sum(1, false, at::kDouble));
  }
  if (!std::isfinite(scores.first_order.sum().item<double>() + scores.output_change.sum().item<double>()))
    fail<NumericError>(
        "scores of weight perturbations are not finite in sequences {} to {}; check the weights of the "
        "model, "
        "or compute in f32",
        key.first_sequence, key.first_sequence + n_sequences - 1);
  return scores;
}

PerturbationScores perturbation_scores_reference(const at::Tensor& x_in, const at::Tensor& gradient_in,
                                                 const at::Tensor& mask, const at::Tensor& token_weights,
                                                 const at::Tensor& delta) {
  check_shapes(x_in, gradient_in, mask, token_weights);
  const at::Tensor x = zero_padding(x_in, mask).to(at::kDouble);
  const at::Tensor gradient = zero_padding(gradient_in, mask).to(at::kDouble);
  PerturbationScores scores{.first_order = at::zeros({x.size(0), delta.size(0)}, at::kDouble),
                            .output_change = at::zeros({x.size(0), delta.size(0)}, at::kDouble),
                            .weighted_change = at::zeros({x.size(0), delta.size(0)}, at::kDouble),
                            .gradient_norm = at::zeros({x.size(0)}, at::kDouble)};
  for (int64_t s = 0; s < x.size(0); ++s) {
    scores.gradient_norm[s] = gradient[s].t().mm(x[s]).square().sum();
    for (int64_t k = 0; k < delta.size(0); ++k) {
      const at::Tensor change = x[s].mm(delta[k].to(at::kDouble).t());  // X ΔWᵀ [T, d_out]
      scores.first_order[s][k] = (gradient[s] * change).sum();
      const at::Tensor energy = change.square().sum(1);
      scores.output_change[s][k] = energy.sum();
      scores.weighted_change[s][k] = (energy * token_weights[s].to(at::kDouble)).sum();
    }
  }
  return scores;
}

}  // namespace isobath::sensitivity
