// Linears, norms, gates and logits of a transformer block on the CPU, in the dtype that this machine computes
// bf16 checkpoints in, beside ATen's operations. ISOBATH_KERNELS=aten runs the same functions without
// kernels.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/kernels/linear.hpp>
#include <isobath/kernels/logits.hpp>

namespace isobath::kernels {
namespace {

constexpr int64_t kTokens = 1024, kVocabulary = 49152;

at::Tensor random(at::IntArrayRef shape) {
  return at::randn(shape).to(has_avx512_bf16() ? at::kBFloat16 : at::kFloat);
}

struct Product {
  explicit Product(const benchmark::State& state)
      : n(state.range(0)),
        d_in(state.range(1)),
        d_out(state.range(2)),
        x(random({n, d_in})),
        gradient(random({n, d_out})),
        weight(random({d_out, d_in})) {}
  void count(benchmark::State& state) const {
    state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * static_cast<double>(n * d_in * d_out),
                                                   benchmark::Counter::kIsIterationInvariantRate);
  }
  int64_t n, d_in, d_out;
  at::Tensor x, gradient, weight;
};

void forward(benchmark::State& state) {
  const Product p(state);
  for (auto _ : state) benchmark::DoNotOptimize(linear_forward(p.x, p.weight, {}));
  p.count(state);
}
void backward(benchmark::State& state) {
  const Product p(state);
  for (auto _ : state) benchmark::DoNotOptimize(linear_backward(p.gradient, p.weight));
  p.count(state);
}
void library_forward(benchmark::State& state) {
  const Product p(state);
  for (auto _ : state) benchmark::DoNotOptimize(at::linear(p.x, p.weight));
  p.count(state);
}
void library_backward(benchmark::State& state) {
  const Product p(state);
  for (auto _ : state) benchmark::DoNotOptimize(at::mm(p.gradient, p.weight));
  p.count(state);
}

#define SHAPES                        \
  ->Args({kTokens, 576, 1536})        \
      ->Args({kTokens, 1536, 576})    \
      ->Args({kTokens, 576, 192})     \
      ->Args({256, 576, kVocabulary}) \
      ->Args({kTokens, 4096, 4096})   \
      ->Unit(benchmark::kMillisecond)
BENCHMARK(forward) SHAPES;
BENCHMARK(library_forward) SHAPES;
BENCHMARK(backward) SHAPES;
BENCHMARK(library_backward) SHAPES;

void norm(benchmark::State& state) {
  const at::Tensor x = random({kTokens, 576}), weight = random({576});
  for (auto _ : state) benchmark::DoNotOptimize(rms_norm(x, weight, 1e-5));
}
BENCHMARK(norm)->Unit(benchmark::kMillisecond);

void norm_backward(benchmark::State& state) {
  const at::Tensor x = random({kTokens, 576}), weight = random({576});
  for (auto _ : state) benchmark::DoNotOptimize(rms_norm_backward(x, weight, 1e-5, x, x));
}
BENCHMARK(norm_backward)->Unit(benchmark::kMillisecond);

void gate(benchmark::State& state) {
  const at::Tensor x = random({kTokens, 1536}), up = random({kTokens, 1536});
  for (auto _ : state) benchmark::DoNotOptimize(gated(x, up));
}
BENCHMARK(gate)->Unit(benchmark::kMillisecond);

void gate_backward(benchmark::State& state) {
  const at::Tensor x = random({kTokens, 1536}), up = random({kTokens, 1536});
  for (auto _ : state) benchmark::DoNotOptimize(gated_backward(x, up, x));
}
BENCHMARK(gate_backward)->Unit(benchmark::kMillisecond);

void loss(benchmark::State& state) {
  const at::Tensor logits = random({256, kVocabulary}), labels = at::randint(kVocabulary, {256}, at::kLong);
  for (auto _ : state) benchmark::DoNotOptimize(label_loss(logits, labels));
}
BENCHMARK(loss)->Unit(benchmark::kMillisecond);

void comparison(benchmark::State& state) {
  const at::Tensor p = random({256, kVocabulary}), q = random({256, kVocabulary}),
                   labels = at::randint(kVocabulary, {256}, at::kLong);
  for (auto _ : state) benchmark::DoNotOptimize(compare_logits(p, q, labels));
}
BENCHMARK(comparison)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace isobath::kernels

int main(int argc, char** argv) {
  at::set_num_threads(1);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
