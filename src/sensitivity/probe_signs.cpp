#include "probe_signs.hpp"

#include <ATen/ATen.h>

namespace isobath::sensitivity {

at::Tensor probe_signs(const CounterRandom& random, int64_t sequence, int64_t sample, int64_t n_probes,
                       int64_t n_outputs) {
  at::Tensor signs = at::empty({n_probes, n_outputs}, at::kFloat);
  float* const values = signs.data_ptr<float>();
  for (int64_t probe = 0; probe < n_probes; ++probe) {
    const auto draw = static_cast<uint32_t>(sample * n_probes + probe);
    for (int64_t begin = 0; begin < n_outputs; begin += 128) {
      const auto words =
          random.words(static_cast<uint64_t>(sequence), static_cast<uint32_t>(begin / 128), draw);
      for (int64_t c = begin; c < std::min(begin + 128, n_outputs); ++c) {
        const int64_t bit = c - begin;
        values[probe * n_outputs + c] = (words[bit / 32] >> (bit % 32) & 1U) != 0 ? 1.0F : -1.0F;
      }
    }
  }
  return signs;
}

at::Tensor without(const at::Tensor& padding, const at::Tensor& values) {
  const at::Tensor copy = values.to(at::kFloat);
  return padding.defined() ? copy.masked_fill(padding.unsqueeze(1), 0.0) : copy;
}

}  // namespace isobath::sensitivity
