// The column loop beside the time of its own matrix products and beside a literal loop with one tensor
// operation a column; the factorization beside LAPACK's. One thread, each ratio from one run, in seconds of
// processor time: other processes on the machine count little.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <isobath/quant/solver.hpp>
#include <vector>

namespace isobath::quant {
namespace {

double processor_s() {
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}

/// The median of as many calls as fit into a second, at least three.
template <class Action>
double median_s(const Action& action) {
  std::vector<double> calls;
  const double start = processor_s();
  do {
    const double before = processor_s();
    action();
    calls.push_back(processor_s() - before);
  } while (calls.size() < 3 || processor_s() - start < 1);
  std::sort(calls.begin(), calls.end());
  return calls[calls.size() / 2];
}

at::Tensor random_covariance(int64_t d) {
  const at::Tensor x = at::randn({d + 256, d}) * at::exp(0.7 * at::randn({d}));
  return x.t().mm(x) / static_cast<double>(d);
}

/// The products of RowSolver's blocks, alone.
void products(const at::Tensor& errors, const Factor& factor) {
  constexpr int64_t kColumns = 128;
  at::Tensor targets = at::zeros({kColumns, errors.size(1)});
  for (const at::Tensor& panel : factor.panels) {
    const int64_t first = panel.size(0) - panel.size(1);
    for (int64_t begin = 0; begin < panel.size(1); begin += kColumns) {
      const at::Tensor columns = panel.slice(1, begin, begin + kColumns);
      if (first + begin > 0)
        targets.slice(0, 0, columns.size(1))
            .addmm_(columns.slice(0, 0, first + begin).t(), errors.slice(0, 0, first + begin));
    }
  }
}

/// Algorithm 1 of the GPTQ paper in blocks of 128, min–max grids of 128 columns, one operation after the
/// other for each column, as its released implementations do.
at::Tensor literal_loop(const at::Tensor& weights, const at::Tensor& upper) {
  constexpr int64_t kColumns = 128;
  const int64_t d = weights.size(1);
  at::Tensor w = weights.clone(), codes = at::zeros_like(w), scale;
  for (int64_t begin = 0; begin < d; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, d);
    at::Tensor block = w.slice(1, begin, end).clone(), errors = at::zeros_like(block);
    const at::Tensor own = upper.slice(0, begin, end).slice(1, begin, end);
    scale = block.abs().amax(1) / 3.5;
    for (int64_t i = 0; i < end - begin; ++i) {
      const at::Tensor column = block.select(1, i);
      const at::Tensor code = at::round(column / scale).clamp(-4, 3);
      codes.select(1, begin + i).copy_(code);
      const at::Tensor error = (column - code * scale) / own[i][i];
      block.slice(1, i).sub_(error.unsqueeze(1).matmul(own[i].slice(0, i).unsqueeze(0)));
      errors.select(1, i).copy_(error);
    }
    w.slice(1, end).sub_(errors.matmul(upper.slice(0, begin, end).slice(1, end)));
  }
  return codes;
}

void compare(int64_t d, int64_t n_rows) {
  const at::Tensor h = random_covariance(d), w = at::randn({n_rows, d}) / 30;
  Factor factor;
  const double factorize_s = median_s([&] { factor = factorize(h, {}); });
  const at::Tensor wide = h.to(at::kDouble) + factor.damping * factor.mean * at::eye(d, at::kDouble);
  const double cholesky_s = median_s([&] { (void)at::linalg_cholesky(wide); });
  const double inverse_s = median_s([&] {
    const at::Tensor lower = at::linalg_cholesky(wide.flip({0, 1}));
    (void)at::linalg_solve_triangular(lower, at::eye(d, at::kDouble), /*upper=*/false).flip({0, 1});
  });
  const at::Tensor upper =
      at::linalg_cholesky(at::cholesky_inverse(at::linalg_cholesky(wide)), true).to(at::kFloat);

  const GridSpec plain{.bits = 3, .group = 64, .clip_search = false};
  const int64_t height = tile_rows(n_rows);
  const auto solve = [&](const GridSpec& spec) {
    RowSolver solver(w, factor, spec, height);
    for (const at::Tensor& panel : factor.panels) solver.advance(panel);
    (void)solver.take();
  };
  const double loop_s = median_s([&] { solve(plain); });
  const double searched_s = median_s([&] { solve({.bits = 3, .group = 64}); });
  const at::Tensor errors = at::randn({d, height});
  const double products_s = median_s([&] {
    for (int64_t row = 0; row < n_rows; row += height) products(errors, factor);
  });
  const double literal_s = median_s([&] { (void)literal_loop(w, upper); });
  fmt::print(
      "{:>6} {:>6} | {:>9.3f} {:>9.3f} {:>6.2f} {:>9.3f} {:>6.1f} | {:>9.3f} | {:>9.3f} {:>9.3f} {:>6.2f} "
      "{:>9.3f} {:>6.1f}\n",
      d, n_rows, loop_s, products_s, products_s / loop_s, literal_s, literal_s / loop_s, searched_s,
      factorize_s, cholesky_s, cholesky_s / factorize_s, inverse_s, inverse_s / factorize_s);
  std::fflush(stdout);
}

}  // namespace
}  // namespace isobath::quant

int main(int argc, char** argv) {
  at::set_num_threads(1);
  const at::NoGradGuard no_grad;
  at::manual_seed(1);
  const int64_t largest = argc > 1 ? std::atoll(argv[1]) : 4096;
  fmt::print(
      "processor seconds; solve: 3 bits, group 64, min-max grids; share: products / solve; then with clip "
      "search\n");
  fmt::print("{:>6} {:>6} | {:>9} {:>9} {:>6} {:>9} {:>6} | {:>9} | {:>9} {:>9} {:>6} {:>9} {:>6}\n", "d",
             "rows", "solve", "products", "share", "literal", "ratio", "searched", "factor", "cholesky",
             "ratio", "inverse", "ratio");
  for (const int64_t d : {576, 1536, 4096, 8192, 16384})
    if (d <= largest) isobath::quant::compare(d, std::min<int64_t>(d, 1024));
}
