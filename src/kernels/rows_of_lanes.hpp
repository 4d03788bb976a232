#pragma once
#include "elementwise_rows.hpp"
#include "lanes.hpp"
#include "logits_rows.hpp"
#include "squares_rows.hpp"

/// The row functions over Lanes<Value>. Included only by avx2/rows.cpp and avx512/rows.cpp, after their
/// `#pragma GCC target` and Lanes.
namespace isobath::kernels {

inline constexpr float kLog2OfE = 1.44269504F;

/// Σ x² in each lane.
template <class V, class Value>
ISOBATH_INLINE typename V::Vector squares_of(const Value* x, int64_t n) {
  auto squares = V::set(0);
  for_lanes<V>(n, [&](int64_t j, auto lanes) {
    const auto value = V::load(x + j, lanes);
    squares = V::fma(value, value, squares);
  });
  return squares;
}

template <class V, class Value>
ISOBATH_INLINE float inverse_rms(const Value* x, int64_t d, float eps) {
  return 1.0F / __builtin_sqrtf(V::sum(squares_of<V>(x, d)) / static_cast<float>(d) + eps);
}

template <class V>
ISOBATH_INLINE typename V::Vector sigmoid(typename V::Vector x) {
  const auto one = V::set(1);
  return one / (one + V::exp2(x * V::set(-kLog2OfE)));
}

template <class Value>
void ElementwiseRows<Value>::rms_norm(const Value* x, const Value* weight, int64_t d, float eps, Value* to) {
  using V = Lanes<Value>;
  const auto scale = V::set(inverse_rms<V>(x, d, eps));
  for_lanes<V>(d, [&](int64_t j, auto lanes) {
    const auto unit = V::rounded(V::load(x + j, lanes) * scale);
    V::store(to + j, lanes, V::load(weight + j, lanes) * unit);
  });
}

template <class Value>
void ElementwiseRows<Value>::rms_norm_backward(const Value* x, const Value* weight, int64_t d, float eps,
                                               const Value* gradient, const Value* residual, Value* to) {
  using V = Lanes<Value>;
  const float inverse = inverse_rms<V>(x, d, eps);
  auto sums = V::set(0);
  for_lanes<V>(d, [&](int64_t j, auto lanes) {
    const auto g = V::load(gradient + j, lanes) * V::load(weight + j, lanes);
    sums = V::fma(g, V::load(x + j, lanes), sums);
  });
  // mean(g · unit) · unit = Σ g x · scale² / d · x
  const auto along = V::set(V::sum(sums) * inverse * inverse / static_cast<float>(d)),
             scale = V::set(inverse);
  for_lanes<V>(d, [&](int64_t j, auto lanes) {
    const auto g = V::load(gradient + j, lanes) * V::load(weight + j, lanes);
    const auto across = g - V::load(x + j, lanes) * along;
    const auto rest = residual == nullptr ? V::set(0) : V::load(residual + j, lanes);
    V::store(to + j, lanes, V::fma(across, scale, rest));
  });
}

template <class Value>
void ElementwiseRows<Value>::gated(const Value* gate, const Value* up, int64_t n, Value* to) {
  using V = Lanes<Value>;
  for_lanes<V>(n, [&](int64_t j, auto lanes) {
    const auto g = V::load(gate + j, lanes);
    V::store(to + j, lanes, V::rounded(g * sigmoid<V>(g)) * V::load(up + j, lanes));
  });
}

template <class Value>
void ElementwiseRows<Value>::gated_backward(const Value* gate, const Value* up, const Value* gradient,
                                            int64_t n, Value* gate_gradient, Value* up_gradient) {
  using V = Lanes<Value>;
  const auto one = V::set(1);
  for_lanes<V>(n, [&](int64_t j, auto lanes) {
    const auto g = V::load(gate + j, lanes), d = V::load(gradient + j, lanes), s = sigmoid<V>(g);
    V::store(up_gradient + j, lanes, d * (g * s));
    // silu'(g) = s (1 + g (1 − s))
    const auto slope = s * V::fma(g, one - s, one);
    V::store(gate_gradient + j, lanes, d * V::load(up + j, lanes) * slope);
  });
}

template <class Value>
float SquaresRows<Value>::sum(const Value* x, int64_t n) {
  using V = Lanes<Value>;
  return V::sum(squares_of<V>(x, n));
}

template <class Value>
void SquaresRows<Value>::channels(const Value* x, int64_t stride, const float* weights, int64_t n_rows,
                                  int64_t n, double* plain, double* weighted, float* largest) {
  using V = Lanes<Value>;
  // Down a vector of channels at a time: its sums stay in registers.
  for_lanes<V>(n, [&](int64_t j, auto lanes) {
    auto sum = V::set(0), weighted_sum = V::set(0), peak = V::set(0);
    for (int64_t i = 0; i < n_rows; ++i) {
      const auto value = V::load(x + i * stride + j, lanes);
      const auto square = value * value, opposite = V::set(0) - value;
      const auto magnitude = V::select(V::is_greater(value, opposite), value, opposite);
      sum += square;
      weighted_sum = V::fma(V::set(weights[i]), square, weighted_sum);
      peak = V::select(V::is_greater(magnitude, peak), magnitude, peak);
    }
    float of_sum[V::kCount], of_weighted[V::kCount], of_peak[V::kCount];
    __builtin_memcpy(of_sum, &sum, sizeof(of_sum));
    __builtin_memcpy(of_weighted, &weighted_sum, sizeof(of_weighted));
    __builtin_memcpy(of_peak, &peak, sizeof(of_peak));
    const int64_t end = n - j < V::kCount ? n - j : V::kCount;
    for (int64_t lane = 0; lane < end; ++lane) {
      plain[j + lane] += of_sum[lane];
      weighted[j + lane] += of_weighted[lane];
      if (of_peak[lane] > largest[j + lane]) largest[j + lane] = of_peak[lane];
    }
  });
}

/// f32 sums run over this many values, f64 over the rest of a vocabulary.
inline constexpr int64_t kSumLength = 4096;

template <class Value>
typename LogitsRows<Value>::Peak LogitsRows<Value>::largest(const Value* logits, int64_t n) {
  using V = Lanes<Value>;
  const auto lowest = V::set(-3.4028235e38F);
  auto maxima = lowest;
  auto places = V::places(0);
  for_lanes<V>(n, [&](int64_t j, auto lanes) {
    const auto value = keep<V>(lanes, V::load(logits + j, lanes), lowest);
    const auto is_larger = V::is_greater(value, maxima);
    maxima = V::select(is_larger, value, maxima);
    places = V::select(is_larger, V::places(static_cast<int>(j)), places);
  });
  float value_of[V::kCount];
  int32_t place_of[V::kCount];
  __builtin_memcpy(value_of, &maxima, sizeof(value_of));
  V::store_places(place_of, places);
  Peak peak{V::largest(maxima), n};
  for (int lane = 0; lane < V::kCount; ++lane)
    if (value_of[lane] == peak.value && place_of[lane] < peak.index) peak.index = place_of[lane];
  return peak;
}

template <class Value>
double LogitsRows<Value>::softmax(const Value* logits, int64_t n, float peak, Value* to) {
  using V = Lanes<Value>;
  const auto scale = V::set(kLog2OfE), from = V::set(peak), zero = V::set(0);
  const auto exponential = [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    return V::exp2((V::load(logits + j, lanes) - from) * scale);
  };
  double sum = 0;
  for (int64_t first = 0; first < n; first += kSumLength) {
    auto sums = zero;
    for_lanes<V>(n - first < kSumLength ? n - first : kSumLength,
                 [&](int64_t j, auto lanes) { sums += keep<V>(lanes, exponential(first + j, lanes), zero); });
    sum += V::sum(sums);
  }
  const auto inverse = V::set(static_cast<float>(1.0 / sum));
  for_lanes<V>(n, [&](int64_t j, auto lanes) { V::store(to + j, lanes, exponential(j, lanes) * inverse); });
  return sum;
}

template <class Value>
typename LogitsRows<Value>::Divergence LogitsRows<Value>::divergence(const Value* p, const Value* q,
                                                                     int64_t n, float peak_p, float peak_q) {
  using V = Lanes<Value>;
  const auto scale = V::set(kLog2OfE), from_p = V::set(peak_p), from_q = V::set(peak_q), zero = V::set(0);
  Divergence result{0, 0, 0};
  for (int64_t first = 0; first < n; first += kSumLength) {
    auto sums_p = zero, sums_q = zero, moments = zero;
    for_lanes<V>(n - first < kSumLength ? n - first : kSumLength, [&](int64_t j, auto lanes) {
      const auto below_p = V::load(p + first + j, lanes) - from_p,
                 below_q = V::load(q + first + j, lanes) - from_q;
      const auto weight_p = keep<V>(lanes, V::exp2(below_p * scale), zero);
      sums_p += weight_p;
      sums_q += keep<V>(lanes, V::exp2(below_q * scale), zero);
      moments = V::fma(weight_p, below_p - below_q, moments);
    });
    result.sum_p += V::sum(sums_p);
    result.sum_q += V::sum(sums_q);
    result.moment += V::sum(moments);
  }
  return result;
}

}  // namespace isobath::kernels
