// What the kernels for CUDA devices reach, beside library products in the same run: covariance (useful
// operations 2·n·d², symmetry halves the executed ones), the column loop beside one f32 product of as many
// operations as its own, refinement. Medians of wall seconds between waits for the device.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAFunctions.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <isobath/kernels/gram.hpp>
#include <isobath/quant/refine.hpp>
#include <isobath/quant/slab.hpp>
#include <isobath/quant/solver.hpp>
#include <vector>

namespace isobath {
namespace {

const c10::Device kDevice(c10::kCUDA, 0);

/// The median of as many calls as fit into a third of a second, at least three, after one that counts
/// nothing.
template <class Action>
double median_s(const Action& action) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  };
  action();
  std::vector<double> calls;
  const auto start = Clock::now();
  do {
    c10::cuda::device_synchronize();
    const auto before = Clock::now();
    action();
    c10::cuda::device_synchronize();
    calls.push_back(seconds(before));
  } while (calls.size() < 3 || seconds(start) < 0.3);
  std::sort(calls.begin(), calls.end());
  return calls[calls.size() / 2];
}

at::Tensor random(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::randn(shape, at::TensorOptions(kDevice)).to(dtype);
}

void covariance(int64_t n_tokens, int64_t d, at::ScalarType dtype) {
  const at::Tensor x = random({n_tokens, d}, dtype), roots = at::rand({n_tokens}, at::TensorOptions(kDevice));
  at::Tensor upper = at::zeros({d, d}, at::TensorOptions(kDevice));
  const double gram_s = median_s([&] { (void)kernels::add_gram(upper, x, roots); });
  const double product_s = median_s([&] { (void)at::mm(x.t(), x); });
  const double flops = 2.0 * static_cast<double>(n_tokens) * static_cast<double>(d) * static_cast<double>(d);
  fmt::print("{:>9} {:>6} {:>6} | {:>9.3f} {:>9.1f} | {:>9.3f} {:>9.1f} | {:>6.2f}\n", c10::toString(dtype),
             n_tokens, d, 1e3 * gram_s, 1e-12 * flops / gram_s, 1e3 * product_s, 1e-12 * flops / product_s,
             product_s / gram_s);
  std::fflush(stdout);
}

void solver(int64_t d, int64_t n_rows) {
  const at::Tensor x = at::randn({d + 256, d}, at::TensorOptions(kDevice)) *
                       at::exp(0.7 * at::randn({d}, at::TensorOptions(kDevice)));
  const quant::Factor factor = quant::factorize((x.t().mm(x) / static_cast<double>(d)).cpu(), {});
  const at::Tensor w = random({n_rows, d}, at::kFloat) / 30;
  std::vector<at::Tensor> panels;
  for (const at::Tensor& panel : factor.panels) panels.push_back(panel.to(kDevice));
  const quant::GridSpec plain{.bits = 3, .group = 64, .clip_search = false}, searched{.bits = 3, .group = 64};
  quant::QuantizedMatrix codes;
  const auto solve = [&](const quant::GridSpec& spec) {
    quant::RowSolver rows(w, factor, spec, quant::tile_rows(n_rows));
    for (const at::Tensor& panel : panels) rows.advance(panel);
    codes = rows.take();
  };
  const double plain_s = median_s([&] { solve(plain); }), searched_s = median_s([&] { solve(searched); });
  // As many operations as the loop's products, in one f32 product of the library.
  const at::Tensor left = random({n_rows, d}, at::kFloat), right = random({d, d / 2}, at::kFloat);
  const double product_s = median_s([&] { (void)at::mm(left, right); });
  const std::vector<Range> ranges = quant::refinement_slabs(quant::panels_of(factor), 64);
  std::vector<quant::Slab> slabs;
  for (const Range& columns : ranges) {
    slabs.push_back(quant::slab_of(factor, columns, /*is_for_sweep=*/true));
    slabs.back().rows = slabs.back().rows.to(kDevice);
    slabs.back().curvature = slabs.back().curvature.to(kDevice);
  }
  const double sweep_s = median_s([&] {
    quant::Refiner refiner(codes, w, factor);
    for (const quant::Slab& slab : slabs) refiner.load(slab);
    for (const quant::Slab& slab : slabs) refiner.sweep(slab);
  });
  fmt::print("{:>6} {:>6} | {:>9.2f} {:>9.2f} | {:>9.2f} {:>6.2f} | {:>9.2f}\n", d, n_rows, 1e3 * plain_s,
             1e3 * searched_s, 1e3 * product_s, product_s / plain_s, 1e3 * sweep_s);
  std::fflush(stdout);
}

}  // namespace
}  // namespace isobath

int main(int argc, char** argv) {
  if (c10::cuda::device_count() == 0) {
    fmt::print("device_bench: no CUDA device here\n");
    return 2;
  }
  const at::NoGradGuard no_grad;
  const int64_t largest = argc > 1 ? std::atoll(argv[1]) : 28672;
  fmt::print("{:>9} {:>6} {:>6} | {:>9} {:>9} | {:>9} {:>9} | {:>6}\n", "dtype", "n", "d", "gram ms",
             "TFLOP/s", "product", "TFLOP/s", "ratio");
  for (const auto dtype : {at::kBFloat16, at::kFloat})
    for (const int64_t d : {576, 1536, 4096, 8192, 28672})
      if (d <= largest) isobath::covariance(2048, d, dtype);
  fmt::print("3 bits, group 64\n{:>6} {:>6} | {:>9} {:>9} | {:>9} {:>6} | {:>9}\n", "d", "rows", "loop ms",
             "searched", "product", "share", "sweep");
  for (const int64_t d : {576, 1536, 4096, 8192})
    if (d <= largest) isobath::solver(d, d);
}
