// What the sensitivity statistics of a microbatch cost, beside plain matrix products of the same shapes. One
// thread.
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <isobath/sensitivity/channel_statistics.hpp>
#include <isobath/sensitivity/covariance.hpp>
#include <isobath/sensitivity/token_weights.hpp>

namespace isobath::sensitivity {
namespace {

constexpr int64_t kTokens = 1024;

at::Tensor random_bf16(at::IntArrayRef shape) {
  return at::randn(shape).to(at::kBFloat16);
}

void count_flops(benchmark::State& state, double per_iteration) {
  state.counters["GFLOP/s"] =
      benchmark::Counter(per_iteration * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void covariance_add(benchmark::State& state) {
  const int64_t d = state.range(0);
  const at::Tensor x = random_bf16({kTokens, d}), weights = at::rand({kTokens});
  Covariance covariance(d);
  for (auto _ : state) covariance.add(x, weights);
  count_flops(state, 2.0 * kTokens * d * d);  // useful operations; symmetry halves the executed ones
}
BENCHMARK(covariance_add)->Arg(576)->Arg(1536)->Arg(4096)->Unit(benchmark::kMillisecond);

/// The limit: a full product of the same size at the machine's bf16 rate.
void full_product_bf16(benchmark::State& state) {
  const int64_t d = state.range(0);
  const at::Tensor x = random_bf16({kTokens, d});
  for (auto _ : state) benchmark::DoNotOptimize(at::mm(x.t(), x));
  count_flops(state, 2.0 * kTokens * d * d);
}
BENCHMARK(full_product_bf16)->Arg(576)->Arg(1536)->Arg(4096)->Unit(benchmark::kMillisecond);

void full_product_f32(benchmark::State& state) {
  const int64_t d = state.range(0);
  const at::Tensor x = random_bf16({kTokens, d}).to(at::kFloat), weights = at::rand({kTokens});
  at::Tensor h = at::zeros({d, d});
  for (auto _ : state) h.addmm_(x.t(), x * weights.unsqueeze(1));
  count_flops(state, 2.0 * kTokens * d * d);
}
BENCHMARK(full_product_f32)->Arg(576)->Arg(1536)->Arg(4096)->Unit(benchmark::kMillisecond);

void token_weights_of_gradient(benchmark::State& state) {
  const at::Tensor gradient = random_bf16({1, kTokens, state.range(0)});
  for (auto _ : state) benchmark::DoNotOptimize(token_weights(gradient, state.range(1)));
}
BENCHMARK(token_weights_of_gradient)
    ->Args({576, 1})
    ->Args({1536, 1})
    ->Args({1536, 4})
    ->Unit(benchmark::kMillisecond);

template <PerSequence kEstimator>
void channel_statistics_observe(benchmark::State& state) {
  const at::Tensor x = random_bf16({1, kTokens, state.range(0)}),
                   gradient = random_bf16({1, kTokens, state.range(1)});
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
void input_gradient_bf16(benchmark::State& state) {
  const at::Tensor gradient = random_bf16({kTokens, state.range(1)});
  const at::Tensor weight = random_bf16({state.range(1), state.range(0)});
  for (auto _ : state) benchmark::DoNotOptimize(at::mm(gradient, weight));
  count_flops(state, 2.0 * kTokens * state.range(0) * state.range(1));
}
BENCHMARK(input_gradient_bf16)->Args({576, 1536})->Args({1536, 576})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace isobath::sensitivity

int main(int argc, char** argv) {
  at::set_num_threads(1);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
