// Attention on the CPU beside at::scaled_dot_product_attention, forward and backward, in the dtype that this
// machine computes bf16 checkpoints in.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include <isobath/kernels/attention.hpp>
#include <isobath/kernels/cpu.hpp>

namespace isobath::kernels {
namespace {

struct Problem {
  explicit Problem(const benchmark::State& state)
      : length(state.range(0)),
        n_heads(state.range(1)),
        n_kv_heads(state.range(2)),
        head_dim(state.range(3)),
        spec{n_heads, n_kv_heads, head_dim, at::rand({length, head_dim}), at::rand({length, head_dim})},
        q(random(n_heads)),
        k(random(n_kv_heads)),
        v(random(n_kv_heads)) {}
  [[nodiscard]] at::Tensor random(int64_t heads) const {
    return at::randn({1, length, heads * head_dim})
        .to(kernels::has_avx512_bf16() ? at::kBFloat16 : at::kFloat);
  }
  /// Operations below the diagonal.
  void count(benchmark::State& state, double passes) const {
    state.counters["GFLOP/s"] =
        benchmark::Counter(passes * static_cast<double>(length * length * n_heads * head_dim) * 1e-9,
                           benchmark::Counter::kIsIterationInvariantRate);
  }
  int64_t length, n_heads, n_kv_heads, head_dim;
  AttentionSpec spec;
  at::Tensor q, k, v;
};

void forward(benchmark::State& state) {
  const Problem p(state);
  for (auto _ : state) benchmark::DoNotOptimize(attention(p.spec, p.q, p.k, p.v));
  p.count(state, 2);
}

void forward_and_backward(benchmark::State& state) {
  const Problem p(state);
  const at::Tensor g = p.random(p.n_heads);
  for (auto _ : state)
    benchmark::DoNotOptimize(attention_backward(p.spec, p.q, p.k, p.v, attention(p.spec, p.q, p.k, p.v), g));
  p.count(state, 7);
}

void library_forward(benchmark::State& state) {
  const Problem p(state);
  const auto heads = [&](const at::Tensor& x) { return x.unflatten(-1, {-1, p.head_dim}).transpose(1, 2); };
  for (auto _ : state)
    benchmark::DoNotOptimize(at::scaled_dot_product_attention(heads(p.q), heads(p.k), heads(p.v), {}, 0.0,
                                                              true, {}, p.n_heads != p.n_kv_heads));
  p.count(state, 2);
}

void library_forward_and_backward(benchmark::State& state) {
  const Problem p(state);
  const auto heads = [&](const at::Tensor& x) { return x.unflatten(-1, {-1, p.head_dim}).transpose(1, 2); };
  const at::Tensor g = heads(p.random(p.n_heads));
  for (auto _ : state) {
    const std::vector<at::Tensor> inputs{heads(p.q).detach().requires_grad_(),
                                         heads(p.k).detach().requires_grad_(),
                                         heads(p.v).detach().requires_grad_()};
    const at::Tensor out = at::scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], {}, 0.0, true,
                                                            {}, p.n_heads != p.n_kv_heads);
    benchmark::DoNotOptimize(torch::autograd::grad({out}, inputs, {g}));
  }
  p.count(state, 7);
}

#define SHAPES \
  ->Args({1024, 9, 3, 64})->Args({2048, 9, 3, 64})->Args({2048, 8, 1, 128})->Unit(benchmark::kMillisecond)
BENCHMARK(forward) SHAPES;
BENCHMARK(forward_and_backward) SHAPES;
BENCHMARK(library_forward) SHAPES;
BENCHMARK(library_forward_and_backward) SHAPES;

}  // namespace
}  // namespace isobath::kernels

int main(int argc, char** argv) {
  at::set_num_threads(1);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
