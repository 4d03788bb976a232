#include <isobath/pipeline/calibrate.hpp>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fcntl.h>
#include <unistd.h>

#include <fstream>
#include <isobath/comm/cores.hpp>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/config/run_config.hpp>
#include <isobath/core/host_memory.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/formats/packing.hpp>
#include <isobath/io/files.hpp>
#include <isobath/kernels/attention.hpp>
#include <isobath/kernels/cpu.hpp>
#include <isobath/kernels/elementwise.hpp>
#include <isobath/kernels/gram.hpp>
#include <isobath/kernels/linear.hpp>
#include <isobath/plan/cluster.hpp>
#include <isobath/plan/work.hpp>
#include <isobath/quant/factor.hpp>
#include <isobath/quant/solver.hpp>

#include "calibrate_device.hpp"

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;

// Long enough to average over the scheduler, short enough that all of them take under a minute.
constexpr double kSecondsEach = 1.0;
constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// Sizes of a small model's pass: products far above cache size, and a second or less each on a slow core.
constexpr int64_t kTokens = 1024, kWide = 2048, kChannels = 1024, kHeads = 16, kHeadDim = 64, kKeyHeads = 4;
constexpr int64_t kMessageBytes = int64_t{16} << 20, kFileBytes = int64_t{128} << 20;

class Calibration {
 public:
  explicit Calibration(const comm::Communicator& world) : world_(world), node_(world.node()) {
    cluster_.ranks_per_node = node_.size();
    cluster_.nodes = std::max(1, world.size() / node_.size());
    device_ = comm::select_device("auto", node_);
    cluster_.device = device_.is_cuda() ? "cuda" : "cpu";
    cluster_.memory.device_gib = static_cast<double>(comm::device_memory_bytes(device_)) / kGiB;
    cluster_.name = world.host();
    cluster_.host.threads = std::max(1, comm::cores_of(node_).per_rank);
    at::set_num_threads(static_cast<int>(cluster_.host.threads));
    cluster_.memory.node_gib = static_cast<double>(host_memory_bytes()) / kGiB;
  }

  plan::Cluster measure() {
    const at::NoGradGuard no_grad;
    products();
    elementwise();
    // Where there are devices, `compute` is theirs.
    if (device_.is_cuda())
      calibrate_device(cluster_, device_, [this](const auto& action) { return seconds_of(action); });
    solver();
    packing();
    network();
    world_.agree_on([&] { write_file(); });
    filesystem();
    return cluster_;
  }

 private:
  /// Seconds of one call: the median of many, so that a pause by something else does not count.
  template <class Action>
  static double median_s(const Action& action) {
    action();
    std::vector<double> calls;
    const Timer timer;
    do {
      const Timer call;
      action();
      calls.push_back(call.seconds());
    } while (timer.seconds() < kSecondsEach);
    std::sort(calls.begin(), calls.end());
    log::debug("  {} calls: fastest {:.3g} s, median {:.3g} s, slowest {:.3g} s", calls.size(), calls.front(),
               calls[calls.size() / 2], calls.back());
    return calls[calls.size() / 2];
  }

  /// Of the slowest rank, while all ranks work at once.
  template <class Action>
  double seconds_of(const Action& action) {
    world_.barrier();
    return world_.all_reduce(median_s(action), comm::Reduce::max);
  }

  /// What `compute_dtype: auto` computes a bf16 checkpoint in; known once products were measured.
  [[nodiscard]] at::ScalarType dtype() const { return cluster_.prefers_bf16() ? at::kBFloat16 : at::kFloat; }

  void products() {
    const at::Tensor x = at::randn({kTokens, kWide}), w = at::randn({kWide, kWide});
    const double flops = 2.0 * kTokens * kWide * kWide;
    const at::Tensor x_bf16 = x.to(at::kBFloat16), w_bf16 = w.to(at::kBFloat16);
    cluster_.compute.bf16_tflops = flops / seconds_of([&] { (void)at::linear(x_bf16, w_bf16); }) / 1e12;
    if (kernels::has_avx2()) {
      cluster_.compute.f32_tflops =
          flops / seconds_of([&] { (void)kernels::linear_forward(x, w, {}); }) / 1e12;
    } else {
      // A panel of the covariance as ATen multiplies it.
      at::Tensor panel = at::zeros({kWide, 256});
      const at::Tensor columns = x.slice(1, 0, 256);
      cluster_.compute.f32_tflops =
          2.0 * kTokens * kWide * 256 / seconds_of([&] { panel.addmm_(x.t(), columns); }) / 1e12;
    }
    const at::Tensor inputs = x.to(dtype());
    if (kernels::has_gram(inputs)) {
      at::Tensor upper = at::zeros({kWide, kWide});
      const at::Tensor roots = at::rand({kTokens});
      const model::ModelConfig any;
      const plan::Shapes shapes = plan::Shapes::of(any, cluster_.prefers_bf16(), /*has_kernels=*/true);
      cluster_.compute.covariance_tflops =
          plan::covariance_add(shapes, kTokens, kWide).covariance_flops /
          seconds_of([&] { (void)kernels::add_gram(upper, inputs, roots); }) / 1e12;
    }
    attention();
    const at::Tensor square = at::randn({kChannels, kChannels}, at::kDouble);
    const double cube = static_cast<double>(kChannels) * kChannels * kChannels;
    cluster_.host.f64_gemm_tflops = 2 * cube / seconds_of([&] { (void)at::mm(square, square); }) / 1e12;
    // A triangular solve of quant::factorize_panel; its products and its passes over memory are counted on
    // their own.
    const at::Tensor root = square.slice(0, 0, 128).slice(1, 0, 128).triu() + 64 * at::eye(128, at::kDouble);
    const at::Tensor above = at::randn({kWide, 128}, at::kDouble);
    cluster_.host.f64_factor_tflops =
        128.0 * 128 * kWide / seconds_of([&] {
          (void)at::linalg_solve_triangular(root.t(), above, /*upper=*/false, /*left=*/false);
        }) /
        1e12;
    const at::Tensor upper = at::randn({128, 4096}), errors = at::randn({128, 64});
    at::Tensor tile = at::zeros({4096, 64});
    cluster_.host.f32_thin_tflops =
        2.0 * 4096 * 128 * 64 / seconds_of([&] { tile.addmm_(upper.t(), errors, 1, -1); }) / 1e12;
  }

  // As model::attend calls it, rotation and all where the kernel does it.
  void attention() {
    const at::Tensor q = at::randn({1, kTokens, kHeads * kHeadDim}).to(dtype());
    const at::Tensor k = at::randn({1, kTokens, kKeyHeads * kHeadDim}).to(dtype());
    const at::Tensor angles = at::randn({kTokens, kHeadDim});
    const kernels::AttentionSpec spec{kHeads, kKeyHeads, kHeadDim, angles.cos(), angles.sin()};
    const auto heads = [](const at::Tensor& x) {
      return x.unflatten(-1, {-1, kHeadDim}).transpose(1, 2).contiguous();
    };
    const at::Tensor queries = heads(q), keys = heads(k);
    // 4 T² d_query for both products, half of it above the diagonal.
    const double flops = 2.0 * kTokens * kTokens * kHeads * kHeadDim;
    const bool has_kernel = kernels::has_attention(spec, q);
    cluster_.compute.attention_tflops =
        flops / seconds_of([&] {
          if (has_kernel)
            (void)kernels::attention(spec, q, k, k);
          else
            (void)at::scaled_dot_product_attention(queries, keys, keys, std::nullopt, 0.0, true, std::nullopt,
                                                   true);
        }) /
        1e12;
  }

  void elementwise() {
    const at::Tensor x = at::randn({kTokens, kWide}).to(dtype()), weight = at::ones({kWide}, dtype());
    const plan::Passes passes =
        plan::Passes::of(static_cast<double>(x.element_size()), cluster_.has_kernels());
    cluster_.compute.memory_gbs = (passes.norm + passes.gate) * kTokens * kWide / seconds_of([&] {
                                    (void)kernels::rms_norm(x, weight, 1e-5);
                                    (void)kernels::gated(x, x);
                                  }) /
                                  1e9;
    const at::Tensor one = at::ones({1});
    operation_us_ = cluster_.compute.operation_us = 1e6 * seconds_of([&] { (void)at::add(one, one); });
    const at::Tensor large = at::ones({int64_t{16} << 20});
    cluster_.host.memory_gbs =
        12.0 * static_cast<double>(large.numel()) / seconds_of([&] { (void)at::add(large, large); }) / 1e9;
  }

  void solver() {
    const at::Tensor rows = at::randn({2 * kChannels, kChannels});
    const at::Tensor h = at::mm(rows.t(), rows);
    // One block of columns without clip search: the column loop alone.
    const quant::Factor factor = quant::factorize(h.slice(0, 0, 128).slice(1, 0, 128).contiguous(), {});
    const at::Tensor w = at::randn({quant::kRowTile, 128}) / 30;
    const quant::GridSpec plain{.bits = 3, .group = 64, .clip_search = false};
    cluster_.host.column_gflops = static_cast<double>(quant::kRowTile) * 128 * 128 /
                                  seconds_of([&] { (void)quant::gptq(w, factor, plain); }) / 1e9;
    const at::Tensor groups = at::randn({512, 64}) / 30, importance = at::rand({64}) + 0.1;
    const quant::GridSpec searched{.bits = 3, .group = 64};
    cluster_.host.candidate_gps = static_cast<double>(groups.numel()) * plan::candidate_grids(3, true, true) /
                                  seconds_of([&] { (void)quant::fit_grid(groups, importance, searched); }) /
                                  1e9;
  }

  void packing() {
    const at::Tensor codes = at::randint(-4, 4, {256, 4096}, at::kChar);
    const at::Tensor words = formats::pack_rows(codes, 3);
    cluster_.host.pack_gps = 2.0 * static_cast<double>(codes.numel()) / seconds_of([&] {
                               (void)formats::pack_rows(codes, 3);
                               (void)formats::unpack_rows(words, 3, 4096);
                             }) /
                             1e9;
  }

  /// Seconds of one step in which each rank sends to `distance` ranks further and receives from as far back.
  double ring_s(const comm::Communicator& group, int distance, const at::Tensor& out, at::Tensor& in) {
    const int n = group.size();
    const int to = (group.rank() + distance) % n, from = (group.rank() + n - distance % n) % n;
    // A fixed number of rounds: ranks that stop at their own clock would leave others waiting.
    const int rounds = out.nbytes() < 1024 ? 1000 : 16;
    const auto step = [&] {
      auto arriving = group.receive_async(in, from, 0);
      auto leaving = group.send_async(out, to, 0);
      leaving.wait();
      arriving.wait();
    };
    step();
    group.barrier();
    const Timer timer;
    for (int round = 0; round < rounds; ++round) step();
    return world_.all_reduce(timer.seconds() / rounds, comm::Reduce::max);
  }

  void network() {
    at::Tensor in = at::empty({kMessageBytes}, at::kByte), small_in = at::empty({1}, at::kByte);
    const at::Tensor out = at::zeros({kMessageBytes}, at::kByte), small = at::zeros({1}, at::kByte);
    plan::Cluster::Network& network = cluster_.network;
    // Alone, nothing is sent; a copy in memory stands for it.
    network.within_node_gbs = cluster_.host.memory_gbs / 2;
    network.latency_us = operation_us_;
    if (cluster_.ranks_per_node > 1)
      network.within_node_gbs = static_cast<double>(kMessageBytes) / ring_s(node_, 1, out, in) / 1e9;
    network.between_nodes_gbs = network.within_node_gbs;
    if (cluster_.nodes > 1)
      network.between_nodes_gbs = static_cast<double>(kMessageBytes) /
                                  ring_s(world_, static_cast<int>(cluster_.ranks_per_node), out, in) / 1e9;
    if (world_.size() > 1) network.latency_us = 1e6 * ring_s(world_, 1, small, small_in);
    if (device_.is_cuda()) device_network();
  }

  void device_network() {
    plan::Cluster::Network& network = cluster_.network;
    const comm::DeviceCommunicator devices(world_, device_);
    const at::TensorOptions bytes = at::TensorOptions(at::kByte).device(device_);
    const at::Tensor out = at::zeros({kMessageBytes}, bytes);
    at::Tensor in = at::empty({kMessageBytes}, bytes);
    // The links that a pipeline has: to the next rank.
    const auto link_s = [&] {
      const int to = world_.rank() + 1, from = world_.rank() - 1;
      const auto step = [&] {
        auto arriving = from >= 0 ? devices.receive_async(in, from, 0) : comm::DeviceCommunicator::Transfer();
        auto leaving =
            to < world_.size() ? devices.send_async(out, to, 0) : comm::DeviceCommunicator::Transfer();
        leaving.wait();
        arriving.wait();
      };
      constexpr int kRounds = 16;
      step();
      world_.barrier();
      const Timer timer;
      for (int round = 0; round < kRounds; ++round) step();
      return world_.all_reduce(timer.seconds() / kRounds, comm::Reduce::max);
    };
    network.device_within_node_gbs = cluster_.compute.memory_gbs / 2;
    if (cluster_.ranks_per_node > 1)
      network.device_within_node_gbs = static_cast<double>(kMessageBytes) / link_s() / 1e9;
    network.device_between_nodes_gbs = network.device_within_node_gbs;
    // One device a node: every neighbour is on another one.
    if (cluster_.nodes > 1 && cluster_.ranks_per_node == 1)
      network.device_between_nodes_gbs = static_cast<double>(kMessageBytes) / link_s() / 1e9;
    else if (cluster_.nodes > 1)
      network.device_between_nodes_gbs = network.between_nodes_gbs;
  }

  [[nodiscard]] fs::path scratch() const {
    return fs::current_path() / fmt::format("isobath-calibrate-{}.tmp", world_.rank());
  }

  void write_file() {
    std::ofstream file(scratch(), std::ios::binary);
    const std::vector<char> piece(size_t{1} << 20);
    for (int64_t written = 0; written < kFileBytes; written += static_cast<int64_t>(piece.size()))
      file.write(piece.data(), static_cast<std::streamsize>(piece.size()));
    file.flush();
    if (!file)
      fail<IoError>("{} cannot be written; calibrate in a directory with {} MiB free for each rank",
                    scratch().string(), kFileBytes >> 20);
  }

  void filesystem() {
    world_.barrier();
    const double all_bytes = static_cast<double>(kFileBytes) * world_.size();
    const Timer writing;
    world_.agree_on([&] {
      write_file();
      io::sync_file(scratch());
    });
    const double write_s = world_.all_reduce(writing.seconds(), comm::Reduce::max);
    // What the page cache holds is not read from the disk.
    const int descriptor = ::open(scratch().c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor >= 0) {
      (void)::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
      ::close(descriptor);
    }
    world_.barrier();
    const Timer reading;
    world_.agree_on([&] { (void)io::read_text(scratch(), 2 * kFileBytes); });
    const double read_s = world_.all_reduce(reading.seconds(), comm::Reduce::max);
    std::error_code ignored;
    fs::remove(scratch(), ignored);
    plan::Cluster::Filesystem& f = cluster_.filesystem;
    f.write_gbs = all_bytes / write_s / 1e9;
    f.read_gbs = all_bytes / read_s / 1e9;
    f.node_write_gbs = f.write_gbs / static_cast<double>(cluster_.nodes);
    f.node_read_gbs = f.read_gbs / static_cast<double>(cluster_.nodes);
  }

  const comm::Communicator& world_;
  comm::Communicator node_;
  c10::Device device_ = c10::Device(c10::kCPU);
  double operation_us_ = 0;  ///< of the host
  plan::Cluster cluster_;
};

}  // namespace

std::string calibrate(const comm::Communicator& world) {
  const Timer timer;
  comm::Watchdog::configure(std::chrono::seconds(config::Ranks{}.watchdog_s));
  const int n_here = world.node().size();
  const int least = world.all_reduce(n_here, comm::Reduce::min),
            most = world.all_reduce(n_here, comm::Reduce::max);
  world.agree(least == most
                  ? ""
                  : fmt::format("calibrating needs as many ranks on every node, found {} to {}; start "
                                "it with --map-by ppr:{}:node",
                                least, most, least),
              ExitCode::config);
  const plan::Cluster cluster = Calibration(world).measure();
  log::info("calibrated {} rank{} in {:.0f} s", world.size(), world.size() == 1 ? "" : "s", timer.seconds());
  return plan::cluster_yaml(
      cluster, fmt::format("Measured by `isobath plan --calibrate` on {} rank{} of {} node{} at once{}.{}",
                           world.size(), world.size() == 1 ? "" : "s", cluster.nodes,
                           cluster.nodes == 1 ? "" : "s", cluster.has_devices() ? ", each on its device" : "",
                           world.size() == 1 ? " One rank: the network's rates are those of a copy in memory."
                           : cluster.nodes == 1 ? " One node: between_nodes is what was measured within it."
                                                : ""));
}

}  // namespace isobath::pipeline
