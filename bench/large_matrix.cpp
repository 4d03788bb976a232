// One projection with a very wide input, solved in panels on all ranks: H of random activations, its factor,
// the codes of all rows. Prints seconds and peak memory of each phase beside what the plan's arithmetic says.
//
//   mpirun -n 2 large_matrix --columns 53248 --rows 16384 --tokens 2048 --cluster this-machine.yaml
//
// With --device cuda the activations are bf16 tensors of the ranks' devices, and so is all that follows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/comm/runtime.hpp>
#include <isobath/core/tensor_memory.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/io/files.hpp>
#include <isobath/kernels/gram.hpp>
#include <isobath/pipeline/panel_factor.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/plan/memory.hpp>
#include <isobath/plan/work.hpp>
#include <isobath/quant/row_solver.hpp>

namespace isobath {
namespace {

struct Options {
  int64_t columns = 8192, rows = 2048, tokens = 2048, shards = 2, threads = 1;
  std::string cluster, device = "cpu";
};

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

double peak_gib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_maxrss) / (1024.0 * 1024.0);
}

class LargeMatrix {
 public:
  LargeMatrix(Options options, const comm::Communicator& world)
      : options_(std::move(options)),
        world_(world),
        device_(comm::select_device(options_.device, world.node())),
        devices_(world, device_) {
    if (!options_.cluster.empty())
      cluster_ = plan::with_ranks(
          plan::parse_cluster(io::read_text(options_.cluster, 1 << 20), options_.cluster), world.size());
  }

  void run() {
    const int64_t d = options_.columns;
    const pipeline::PanelLayout layout{.columns = quant::column_panels(d, quant::kPanel),
                                       .n_ranks = world_.size()};
    std::vector<int> owners;
    for (int64_t shard = 0; shard < options_.shards; ++shard)
      owners.push_back(static_cast<int>(owner_of(shard, options_.shards, world_.size())));
    const Range shards = partition(options_.shards, world_.size(), world_.rank());
    const int64_t n = options_.tokens / options_.shards;
    std::vector<at::Tensor> x;
    for (int64_t shard = shards.begin; shard < shards.end; ++shard) x.push_back(random({n, d}).to(dtype()));
    const at::Tensor token_weights = at::rand({n}, at::TensorOptions(device_));
    if (world_.rank() == 0)
      fmt::print("{} columns, {} rows, {} tokens, {} ranks of {} threads\n{:<16} {:>10} {:>10} {:>12}\n", d,
                 options_.rows, options_.tokens, world_.size(), options_.threads, "", "seconds", "plan",
                 "peak GiB");
    print_planned_memory();
    report("start", 0, {});

    const double local = static_cast<double>(shards.size() * n), width = static_cast<double>(d);
    const auto ranks = static_cast<double>(world_.size());
    Timer timer;
    std::vector<at::Tensor> panels = pipeline::sum_panels(
        layout, owners, world_, device_,
        [&](const pipeline::VisitRows& visit, const std::function<void(int64_t)>& close_shard) {
          for (size_t s = 0; s < x.size(); ++s) {
            visit(x[s], {}, token_weights);
            close_shard(shards.begin + static_cast<int64_t>(s));
          }
        });
    const model::ModelConfig any;
    const plan::Shapes shapes =
        plan::Shapes::of(any, device_.is_cuda(), device_.is_cpu() && kernels::has_gram(at::empty({1, 1})),
                         device_.is_cuda() || kernels::has_gram(at::empty({1, 1})));
    report("covariance", timer.seconds(),
           plan::covariance_sum(shapes, local, width, static_cast<double>(shards.size()), true));
    x.clear();

    timer = Timer();
    const quant::FactorSpec spec{.damping = 0.1};  // fewer tokens than columns
    quant::Factor factor = quant::factor_of_diagonal(pipeline::share_diagonal(panels, layout, world_), spec);
    const bool is_positive = pipeline::factorize_panels(std::move(panels), layout, factor, devices_);
    panels.clear();
    ISOBATH_CHECK(is_positive, "H is not positive definite");
    report("factorization", timer.seconds(), plan::factorize_spread(width, ranks));

    timer = Timer();
    const int64_t height = quant::tile_rows(options_.rows), n_tiles = (options_.rows + height - 1) / height;
    const Range tiles = partition(n_tiles, world_.size(), world_.rank());
    const int64_t n_rows = std::min(options_.rows, tiles.end * height) - tiles.begin * height;
    config::Quantization quantization;
    quantization.bits = 3;
    const quant::GridSpec grid{.bits = 3, .group = 64};
    // Held once here, beside what the plan counts.
    quant::RowSolver solver(random({n_rows, d}).div_(30), factor, grid, height);
    for (size_t p = 0; p < layout.columns.size(); ++p) {
      const at::Tensor panel = pipeline::share_panel(factor, layout, p, devices_);
      factor.panels[p].reset();
      solver.advance(panel);
    }
    const at::Tensor objectives = solver.objectives();
    const quant::QuantizedMatrix matrix = solver.take();
    report("codes", timer.seconds(),
           plan::solve_rows(static_cast<double>(n_rows), width, quantization, static_cast<double>(height),
                            device_.is_cuda() ? 1 : at::get_num_threads()));
    at::Tensor all = at::zeros({n_tiles}, at::kDouble);
    all.slice(0, tiles.begin, tiles.end).copy_(objectives);
    pipeline::share_disjoint(all, world_);
    if (world_.rank() == 0) fmt::print("objective {:.6g}\n", all.sum().item<double>());
  }

 private:
  [[nodiscard]] at::ScalarType dtype() const { return device_.is_cuda() ? at::kBFloat16 : at::kFloat; }
  [[nodiscard]] at::Tensor random(at::IntArrayRef shape) const {
    return at::randn(shape, at::TensorOptions(device_));
  }

  void report(const char* phase, double wall_s, const plan::Work& work) {
    const double slowest = world_.all_reduce(wall_s, comm::Reduce::max);
    const double largest = world_.all_reduce(peak_gib(), comm::Reduce::max);
    if (world_.rank() != 0) return;
    const std::string planned =
        cluster_ ? fmt::format("{:.1f}", plan::seconds_of_rows(work, *cluster_, device_.is_cuda())) : "-";
    fmt::print("{:<16} {:>10.1f} {:>10} {:>12.2f}\n", phase, slowest, planned, largest);
    std::fflush(stdout);
  }

  /// The plan's item for a model whose down projection has this shape, and what stands beside it here.
  void print_planned_memory() const {
    if (world_.rank() != 0 || !cluster_) return;
    model::ModelConfig model;
    model.d_model = options_.rows;
    model.d_ff = options_.columns;
    model.n_blocks = model.n_heads = model.n_kv_heads = 1;
    model.head_dim = model.vocab_size = 64;
    config::RunConfig config;
    config.calibration = {.tokens = {},
                          .sequences = options_.shards,
                          .length = options_.tokens / options_.shards,
                          .microbatch = 1,
                          .logical_shards = options_.shards};
    config.compute_dtype = device_.is_cuda() ? "bfloat16" : "float32";
    config.quantization.refinement.sweeps = 0;
    config.quantization.asymmetric.correction = "none";
    const plan::Job job(config, model, *cluster_, 1, world_.size());
    for (const auto& item : plan::quantize_memory(job, 0).items)
      if (item.name == "process" || item.name.starts_with("H,"))
        fmt::print("plan: {:<20} {:.2f} GiB a rank\n", item.name,
                   (item.device_bytes + item.host_bytes) / kGiB);
  }

  Options options_;
  const comm::Communicator& world_;
  c10::Device device_;
  comm::DeviceCommunicator devices_;
  std::optional<plan::Cluster> cluster_;
};

}  // namespace
}  // namespace isobath

int main(int argc, char** argv) {
  isobath::map_tensors();
  isobath::comm::Runtime runtime(argc, argv);
  isobath::Options options;
  CLI::App app("One wide projection in panels on all ranks");
  app.add_option("--columns", options.columns, "input channels");
  app.add_option("--rows", options.rows, "output channels");
  app.add_option("--tokens", options.tokens, "calibration tokens, of all shards");
  app.add_option("--shards", options.shards, "logical shards; at least one a rank");
  app.add_option("--threads", options.threads, "threads of a rank");
  app.add_option("--cluster", options.cluster, "rates of this machine, from `isobath plan --calibrate`");
  app.add_option("--device", options.device, "where the ranks compute: cpu or cuda");
  CLI11_PARSE(app, argc, argv);
  at::set_num_threads(static_cast<int>(options.threads));
  const at::NoGradGuard no_grad;
  at::manual_seed(static_cast<uint64_t>(runtime.world().rank()));
  isobath::LargeMatrix(options, runtime.world()).run();
}
