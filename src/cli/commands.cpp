#include <isobath/cli/commands.hpp>

#include <torch/headeronly/version.h>
#include <isobath/cli/compare.hpp>
#include <isobath/cli/inspect.hpp>
#include <isobath/cli/plan.hpp>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/config/allocation_file.hpp>
#include <isobath/config/run_config.hpp>
#include <isobath/config/schema.hpp>
#include <isobath/core/version.hpp>
#include <isobath/io/files.hpp>
#include <isobath/pipeline/allocate.hpp>
#include <isobath/pipeline/calibrate.hpp>
#include <isobath/pipeline/diagnose.hpp>
#include <isobath/pipeline/run.hpp>
#include <isobath/report/table.hpp>
#include <isobath/report/timeline.hpp>

namespace isobath::cli {
namespace {

using pipeline::Stage;

/// A configuration is a page; more is a mistaken path.
constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;
/// A line a linear.
constexpr int64_t kMaxAllocationBytes = int64_t{1} << 24;

/// Reads the file that quantization.allocation names, if any, on rank 0 for all.
void read_allocation(config::RunConfig& config, const comm::Communicator& world) {
  const std::string& path = config.quantization.allocation;
  if (path.empty()) return;
  std::string text;
  world.agree_on([&] {
    if (world.rank() != 0) return;
    if (!std::filesystem::is_regular_file(path))
      fail<ConfigError>("quantization.allocation: expected a file of `isobath allocate` in {}, found {}",
                        path, std::filesystem::exists(path) ? "something else" : "nothing");
    text = io::read_text(path, kMaxAllocationBytes);
  });
  world.broadcast(text, 0);
  world.agree_on([&] { config::apply_allocation(config, text, path); });
}

config::RunConfig load_config(const Arguments& arguments, const comm::Communicator& world) {
  std::string text;
  world.agree_on([&] {
    if (world.rank() != 0) return;
    if (!std::filesystem::is_regular_file(arguments.config_path))
      fail<ConfigError>("{}: expected a configuration file, found {}", arguments.config_path,
                        std::filesystem::exists(arguments.config_path) ? "something else" : "nothing");
    text = io::read_text(arguments.config_path, kMaxConfigBytes);
  });
  world.broadcast(text, 0);
  config::RunConfig config;
  try {
    config = config::parse(text, arguments.settings, arguments.config_path);
  } catch (const ConfigError& problem) {
    // Every rank parses the same text, so all are here.
    throw AgreedFailure(problem.code(), problem.what());
  }
  read_allocation(config, world);
  comm::Watchdog::configure(std::chrono::seconds(config.ranks.watchdog_s));
  return config;
}

void check(const Arguments& arguments, const comm::Communicator& world) {
  if (arguments.shows_keys) return log::print(config::keys_markdown());
  if (arguments.shows_schema) return log::print(config::json_schema());
  const config::RunConfig config = load_config(arguments, world);
  world.agree_on([&] {
    if (world.rank() != 0) return;
    report::Table table({"key", "value", "unit"});
    const std::vector<config::KeyInfo>& keys = config::all_keys();
    const auto values = config.flatten();
    for (size_t i = 0; i < keys.size(); ++i) table.add({keys[i].key, values[i].second, keys[i].unit});
    log::print(table.text() + "\n");
    const int n_ranks = arguments.n_ranks > 0 ? arguments.n_ranks : world.size();
    const pipeline::CheckResult result = pipeline::check(config, n_ranks);
    if (!result.summary.empty()) log::print(result.summary + (result.summary.ends_with("\n") ? "" : "\n"));
    if (!result.problems.empty())
      fail<ConfigError>("{} with {} rank{}:\n  {}", arguments.config_path, n_ranks, n_ranks == 1 ? "" : "s",
                        fmt::join(result.problems, "\n  "));
  });
}

void evaluate(const Arguments& arguments, const comm::Communicator& world) {
  const config::RunConfig config = load_config(arguments, world);
  if (arguments.checkpoints.empty() && !arguments.original_only)
    pipeline::run(config, {Stage::evaluate}, false, world);
  else
    pipeline::evaluate_checkpoints(config, {arguments.checkpoints.begin(), arguments.checkpoints.end()},
                                   arguments.json_output, world);
}

void plan(const Arguments& arguments, const comm::Communicator& world) {
  if (arguments.calibrates) {
    const std::string yaml = pipeline::calibrate(world);
    return world.agree_on([&] {
      if (world.rank() != 0) return;
      if (arguments.cluster_output.empty()) return log::print(yaml);
      io::write_text_atomically(arguments.cluster_output, yaml);
      log::info("wrote {}", arguments.cluster_output);
    });
  }
  const config::RunConfig config = load_config(arguments, world);
  world.agree_on([&] {
    if (world.rank() != 0) return;
    const plan::Plan plan = plan_run(
        config,
        {.cluster = arguments.cluster, .model_config = arguments.model_config, .n_ranks = arguments.n_ranks});
    log::print(plan_text(config, plan, {.path = arguments.config_path, .settings = arguments.settings}));
    if (!arguments.json_output.empty())
      io::write_text_atomically(arguments.json_output, plan_json(config, plan));
  });
}

std::string inspected(const Arguments& arguments) {
  const std::string& by = arguments.granularity;
  if (by == "weight" && arguments.model.empty())
    fail<ConfigError>("inspect --by weight: expected --model, the directory of the model that was measured");
  if (by != "weight" && !arguments.model.empty())
    fail<ConfigError>("inspect --model: expected it with --by weight only, found it with --by {}", by);
  if (by == "module")
    return arguments.as_json ? inspect_json(arguments.statistics)
                             : inspect_table(arguments.statistics, arguments.top);
  return inspect_parts(arguments.statistics, {.by = by == "weight"    ? Granularity::weight
                                                    : by == "channel" ? Granularity::channel
                                                                      : Granularity::block,
                                              .n_rows = arguments.top,
                                              .as_json = arguments.as_json,
                                              .model = arguments.model});
}

void inspect(const Arguments& arguments, const comm::Communicator& world) {
  world.agree_on([&] {
    if (world.rank() == 0) log::print(inspected(arguments));
  });
}

void compare(const Arguments& arguments, const comm::Communicator& world) {
  world.agree_on([&] {
    if (world.rank() != 0) return;
    log::print(arguments.as_json
                   ? compare_json(arguments.statistics, arguments.other_statistics)
                   : compare_table(arguments.statistics, arguments.other_statistics, arguments.top));
  });
}

void version() {
  log::print(fmt::format("isobath {} ({})\nLibTorch {}\nMPI {}\ndevice communicator: {}\n", kVersion,
                         kRevision, TORCH_VERSION, ISOBATH_MPI_LIBRARY, comm::device_backend_name()));
}

void run_stages(const Arguments& arguments, const std::vector<Stage>& stages,
                const comm::Communicator& world) {
  const config::RunConfig config = load_config(arguments, world);
  const bool resumes =
      arguments.resume ||
      (arguments.resume_or_start &&
       world.any(std::filesystem::exists(std::filesystem::path(config.output) / "run.json")));
  pipeline::run(config, stages, resumes, world);
}

void dispatch(const Arguments& arguments, const comm::Communicator& world) {
  switch (arguments.command) {
    case Command::run:
      return run_stages(arguments, {Stage::measure, Stage::quantize, Stage::evaluate}, world);
    case Command::measure:
      return run_stages(arguments, {Stage::measure}, world);
    case Command::allocate:
      return pipeline::allocate(load_config(arguments, world),
                                {.mean_bits = arguments.budget_bits,
                                 .bytes = arguments.budget_bytes,
                                 .method = arguments.method,
                                 .first_order = !arguments.no_first_order,
                                 .output = arguments.allocation_output},
                                world);
    case Command::quantize:
      return run_stages(arguments, {Stage::quantize}, world);
    case Command::evaluate:
      return evaluate(arguments, world);
    case Command::diagnose:
      return pipeline::diagnose(
          load_config(arguments, world),
          {.checkpoint = arguments.checkpoints.empty() ? std::string() : arguments.checkpoints[0],
           .tokens = arguments.tokens,
           .sequences = arguments.sequences,
           .samples = arguments.samples,
           .modules = arguments.modules,
           .only_blocks = arguments.only_blocks,
           .rows = arguments.top,
           .output = arguments.json_output},
          world);
    case Command::compare:
      return compare(arguments, world);
    case Command::plan:
      return plan(arguments, world);
    case Command::inspect:
      return inspect(arguments, world);
    case Command::check:
      return check(arguments, world);
    case Command::version:
      return version();
  }
}

}  // namespace

void execute(const Arguments& arguments, const comm::Communicator& world) {
  if (arguments.trace.empty()) return dispatch(arguments, world);
  world.barrier();
  trace::start();
  dispatch(arguments, world);
  const std::vector<std::string> ranks =
      world.all_gather(report::timeline_of_rank(world.rank(), world.host(), trace::stop()));
  world.agree_on([&] {
    if (world.rank() == 0) io::write_text_atomically(arguments.trace, report::timeline(ranks));
  });
}

}  // namespace isobath::cli
