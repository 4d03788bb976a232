// What the sensitivity statistics of a microbatch cost, beside plain matrix products of the same shapes. One
// thread.
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/gram.hpp>
#include <isobath/sensitivity/channel_statistics.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::sensitivity {
namespace {

constexpr int64_t kTokens = 1024;

/// What this machine computes bf16 checkpoints in.
at::ScalarType dtype() {
  return kernels::has_avx512_bf16() ? at::kBFloat16 : at::kFloat;
}

at::Tensor random(at::IntArrayRef shape) {
  return at::randn(shape).to(dtype());
}

/// Names what sums H in a row of the output.
void name_kernel(benchmark::State& state) {
  state.SetLabel(std::string(kernels::implementation_of(dtype())));
}

void count_flops(benchmark::State& state, double per_iteration) {
  state.counters["GFLOP/s"] =
      benchmark::Counter(per_iteration * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void covariance_add(benchmark::State& state) {
  const int64_t d = state.range(0);
  const at::Tensor x = random({kTokens, d}), weights = at::rand({kTokens});
  Covariance covariance(d);
  for (auto _ : state) covariance.add(x, weights);
  count_flops(state, 2.0 * kTokens * d * d);  // useful operations; symmetry halves the executed ones
  name_kernel(state);
}
BENCHMARK(covariance_add)->Arg(576)->Arg(1536)->Arg(4096)->Arg(8192)->Unit(benchmark::kMillisecond);

/// Columns [d − 1536, d) of a sum that would not be held whole.
void covariance_panel(benchmark::State& state) {
  constexpr int64_t kWidth = 1536;
  const int64_t d = state.range(0), begin = (d - kWidth) / kernels::kGramAlignment * kernels::kGramAlignment;
  const at::Tensor x = random({kTokens, d}), roots = at::rand({kTokens});
  if (!kernels::has_gram(x)) return state.SkipWithError("no kernel on this machine");
  at::Tensor panel = at::zeros({begin + kWidth, kWidth});
  for (auto _ : state)
    benchmark::DoNotOptimize(
        kernels::add_gram_panels({&panel, 1}, begin, x.slice(1, 0, begin + kWidth), roots));
  // Elements on and above the diagonal, twice: as many useful operations as in the whole.
  count_flops(state, 4.0 * kTokens * kWidth * (static_cast<double>(begin) + kWidth / 2.0));
  name_kernel(state);
}
BENCHMARK(covariance_panel)->Arg(16384)->Arg(28672)->Unit(benchmark::kMillisecond);

/// A full product of the same size as ATen multiplies bf16.
void full_product_bf16(benchmark::State& state) {
  const int64_t d = state.range(0);
  const at::Tensor x = at::randn({kTokens, d}).to(at::kBFloat16);
  for (auto _ : state) benchmark::DoNotOptimize(at::mm(x.t(), x));
  count_flops(state, 2.0 * kTokens * d * d);
}
BENCHMARK(full_product_bf16)->Arg(576)->Arg(1536)->Arg(4096)->Unit(benchmark::kMillisecond);

void full_product_f32(benchmark::State& state) {
  const int64_t d = state.range(0);
  const at::Tensor x = at::randn({kTokens, d}), weights = at::rand({kTokens});
  at::Tensor h = at::zeros({d, d});
  for (auto _ : state) h.addmm_(x.t(), x * weights.unsqueeze(1));
  count_flops(state, 2.0 * kTokens * d * d);
}
BENCHMARK(full_product_f32)->Arg(576)->Arg(1536)->Arg(4096)->Arg(8192)->Unit(benchmark::kMillisecond);

void token_weights_of_gradient(benchmark::State& state) {
  const at::Tensor gradient = random({1, kTokens, state.range(0)});
  for (auto _ : state) benchmark::DoNotOptimize(token_weights(gradient, state.range(1)));
}
BENCHMARK(token_weights_of_gradient)
    ->Args({576, 1})
    ->Args({1536, 1})
    ->Args({1536, 4})
    ->Unit(benchmark::kMillisecond);

template <PerSequence kEstimator>
void channel_statistics_observe(benchmark::State& state) {
  const at::Tensor x = random({1, kTokens, state.range(0)}), gradient = random({1, kTokens, state.range(1)});
  ChannelStatistics statistics(state.range(0), kEstimator, 4, 0);
  for (auto _ : state) statistics.observe(x, gradient, {}, 0, 0);
}
BENCHMARK(channel_statistics_observe<PerSequence::off>)
    ->Args({576, 1536})
    ->Args({1536, 576})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(channel_statistics_observe<PerSequence::probes>)
    ->Args({576, 1536})
    ->Args({1536, 576})
    ->Unit(benchmark::kMillisecond);
BENCHMARK(channel_statistics_observe<PerSequence::exact>)
    ->Args({576, 1536})
    ->Args({1536, 576})
    ->Unit(benchmark::kMillisecond);

/// The yardstick: what the backward of the same linear costs anyway.
void input_gradient(benchmark::State& state) {
  const at::Tensor gradient = random({kTokens, state.range(1)});
  const at::Tensor weight = random({state.range(1), state.range(0)});
  for (auto _ : state) benchmark::DoNotOptimize(at::mm(gradient, weight));
  count_flops(state, 2.0 * kTokens * state.range(0) * state.range(1));
}
BENCHMARK(input_gradient)->Args({576, 1536})->Args({1536, 576})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace isobath::sensitivity

int main(int argc, char** argv) {
  at::set_num_threads(1);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
