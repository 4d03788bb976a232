#include "calibrate_device.hpp"

#include <ATen/ATen.h>

#include <isobath/kernels/device.hpp>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/kernels/gram.hpp>
#include <isobath/plan/work.hpp>
#include <isobath/quant/refine.hpp>
#include <isobath/quant/slab.hpp>
#include <isobath/quant/solver.hpp>

namespace isobath::pipeline {
namespace {

// A microbatch of a large model: products that fill a device, memory far above its caches.
constexpr int64_t kTokens = 2048, kWide = 8192, kHeads = 64, kKeyHeads = 8, kHeadDim = 128;
// H of the rows that are timed: small enough that the host factorizes it at once.
constexpr int64_t kColumns = 1024, kRows = 4096;
constexpr int64_t kStep = 128, kSquare = 4096;

class DeviceCalibration {
 public:
  DeviceCalibration(plan::Cluster& cluster, c10::Device device, const SecondsOf& seconds_of)
      : cluster_(cluster), device_(device), seconds_of_(seconds_of), probe_(at::zeros({1}, on(at::kFloat))) {}

  void measure() {
    products();
    attention();
    memory();
    rows();
  }

 private:
  [[nodiscard]] at::TensorOptions on(at::ScalarType dtype) const {
    return at::TensorOptions(dtype).device(device_);
  }
  [[nodiscard]] at::Tensor random(at::IntArrayRef shape, at::ScalarType dtype) const {
    return at::randn(shape, on(at::kFloat)).to(dtype);
  }
  /// Seconds of one of `n` calls, until the device has done them.
  [[nodiscard]] double seconds(const std::function<void()>& action, int n = 1) const {
    return seconds_of_([&] {
             for (int call = 0; call < n; ++call) action();
             (void)probe_.item<float>();
           }) /
           n;
  }

  void products() {
    const double flops = 2.0 * kTokens * kWide * kWide;
    const at::Tensor x = random({kTokens, kWide}, at::kFloat), w = random({kWide, kWide}, at::kFloat);
    const at::Tensor x_bf16 = x.to(at::kBFloat16), w_bf16 = w.to(at::kBFloat16);
    plan::Cluster::Compute& compute = cluster_.compute;
    compute.bf16_tflops = flops / seconds([&] { (void)at::linear(x_bf16, w_bf16); }, 8) / 1e12;
    compute.f32_tflops = flops / seconds([&] { (void)at::linear(x, w); }) / 1e12;
    const model::ModelConfig any;
    const plan::Shapes shapes = plan::Shapes::of(any, cluster_.prefers_bf16(), false, /*has_gram=*/true);
    const at::Tensor inputs = cluster_.prefers_bf16() ? x_bf16 : x;
    const at::Tensor roots = at::rand({kTokens}, on(at::kFloat));
    at::Tensor upper = at::zeros({kWide, kWide}, on(at::kFloat));
    compute.covariance_tflops = plan::covariance_add(shapes, kTokens, kWide).covariance_flops /
                                seconds([&] { (void)kernels::add_gram(upper, inputs, roots); }) / 1e12;
    const at::Tensor square = random({kSquare, kSquare}, at::kDouble);
    cluster_.rows.f64_gemm_tflops =
        2.0 * kSquare * kSquare * kSquare / seconds([&] { (void)at::mm(square, square); }) / 1e12;
    // As quant::factorize_panel solves it.
    const at::Tensor root =
        square.slice(0, 0, kStep).slice(1, 0, kStep).triu() + 64 * at::eye(kStep, on(at::kDouble));
    const at::Tensor above = random({kWide, kStep}, at::kDouble);
    cluster_.rows.f64_factor_tflops =
        static_cast<double>(kStep * kStep * kWide) / seconds([&] {
          (void)at::linalg_solve_triangular(root.t(), above, /*upper=*/false, /*left=*/false);
        }) /
        1e12;
  }

  // As model::attend calls it.
  void attention() {
    const at::Tensor q = random({1, kHeads, kTokens, kHeadDim}, dtype()),
                     k = random({1, kKeyHeads, kTokens, kHeadDim}, dtype());
    // 4 T² d_query for both products, half of it above the diagonal.
    cluster_.compute.attention_tflops =
        2.0 * kTokens * kTokens * kHeads * kHeadDim / seconds([&] {
          (void)at::scaled_dot_product_attention(q, k, k, std::nullopt, 0.0, true, std::nullopt, true);
        }) /
        1e12;
  }

  void memory() {
    const at::Tensor x = random({kTokens, kWide}, dtype()), weight = at::ones({kWide}, on(dtype()));
    const plan::Passes passes =
        plan::Passes::of(static_cast<double>(x.element_size()), /*has_kernels=*/false);
    cluster_.compute.memory_gbs = (passes.norm + passes.gate) * kTokens * kWide / seconds([&] {
                                    (void)kernels::rms_norm(x, weight, 1e-5);
                                    (void)kernels::gated(x, x);
                                  }) /
                                  1e9;
    const at::Tensor one = at::ones({1}, on(at::kFloat));
    cluster_.compute.operation_us = 1e6 * seconds([&] { (void)at::add(one, one); }, 1000);
    const at::Tensor large = random({kWide, kWide}, at::kFloat);
    cluster_.compute.host_link_gbs =
        static_cast<double>(large.nbytes()) / seconds([&] { (void)large.cpu(); }) / 1e9;
  }

  void rows() {
    const double d = kColumns, all = static_cast<double>(kRows * kColumns);
    plan::Cluster::Rows& rates = cluster_.rows;
    at::Tensor sum = at::zeros({kStep, kRows}, on(at::kFloat));
    const at::Tensor left = random({kWide, kStep}, at::kFloat), right = random({kWide, kRows}, at::kFloat);
    rates.product_tflops =
        2.0 * kWide * kStep * kRows / seconds([&] { kernels::add_device_product(sum, left, right); }) / 1e12;

    const at::Tensor x = at::randn({2 * kColumns, kColumns});
    const quant::Factor factor = quant::factorize(at::mm(x.t(), x), {});
    std::vector<at::Tensor> panels;
    for (const at::Tensor& panel : factor.panels) panels.push_back(panel.to(device_));
    const at::Tensor w = random({kRows, kColumns}, at::kFloat) / 30;
    config::Quantization quantization;
    quantization.bits = 3;
    quantization.group = 64;
    quantization.refinement.sweeps = 1;
    quant::QuantizedMatrix codes;
    const auto solve_s = [&](bool clip_search) {
      const quant::GridSpec grid{.bits = 3, .group = 64, .clip_search = clip_search};
      return seconds([&] {
        quant::RowSolver solver(w, factor, grid, quant::tile_rows(kRows));
        for (const at::Tensor& panel : panels) solver.advance(panel);
        codes = solver.take();
      });
    };
    const double plain_s = solve_s(false), searched_s = solve_s(true);
    const auto beyond_products_us = [&](double measured_s, const plan::Work& work) {
      return std::max(0.0, measured_s - work.thin_flops / (1e12 * rates.product_tflops)) / d * 1e6;
    };
    const double height = static_cast<double>(quant::tile_rows(kRows));
    rates.column_us = beyond_products_us(plain_s, plan::solve_rows(kRows, d, quantization, height, 1));
    rates.candidate_gps =
        all * plan::candidate_grids(3, true, true) / std::max(1e-6, searched_s - plain_s) / 1e9;

    std::vector<at::Tensor> slab_rows;
    const std::vector<Range> slabs = quant::refinement_slabs(quant::panels_of(factor), quantization.group);
    for (const Range& columns : slabs)
      slab_rows.push_back(quant::slab_of(factor, columns, /*is_for_sweep=*/false).rows.to(device_));
    const double sweep_s = seconds([&] {
      quant::Refiner refiner(codes, w, factor);
      for (const bool is_sweep : {false, true})
        for (size_t s = 0; s < slabs.size(); ++s) {
          const quant::Slab slab(slabs[s], slab_rows[s].clone(), factor, is_sweep);
          is_sweep ? refiner.sweep(slab) : refiner.load(slab);
        }
    });
    rates.refined_column_us = beyond_products_us(
        sweep_s, plan::refine_rows(kRows, d, quantization, 1) + plan::refine_slabs(d, quantization));
  }

  [[nodiscard]] at::ScalarType dtype() const { return cluster_.prefers_bf16() ? at::kBFloat16 : at::kFloat; }

  plan::Cluster& cluster_;
  c10::Device device_;
  const SecondsOf& seconds_of_;
  at::Tensor probe_;
};

}  // namespace

void calibrate_device(plan::Cluster& cluster, c10::Device device, const SecondsOf& seconds_of) {
  DeviceCalibration(cluster, device, seconds_of).measure();
}

}  // namespace isobath::pipeline
