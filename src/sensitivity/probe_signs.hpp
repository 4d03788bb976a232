#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <isobath/core/random.hpp>

namespace isobath::sensitivity {

/// ±1 probes [n_probes, n_outputs] f32 of one sequence: channel c's sign is bit c % 128 of the words keyed
/// (sequence, c / 128, sample·n_probes + probe).
[[nodiscard]] at::Tensor probe_signs(const CounterRandom& random, int64_t sequence, int64_t sample,
                                     int64_t n_probes, int64_t n_outputs);

/// f32 copy with zero rows for padding (which may hold anything, NaN included). values [T, d]; padding [T]
/// bool or undefined.
[[nodiscard]] at::Tensor without(const at::Tensor& padding, const at::Tensor& values);

}  // namespace isobath::sensitivity
