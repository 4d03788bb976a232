#include <isobath/pipeline/run.hpp>

#include <fmt/ranges.h>

#include <isobath/comm/cores.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/host_memory.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/io/files.hpp>
#include <isobath/pipeline/evaluate.hpp>
#include <isobath/pipeline/measure.hpp>
#include <isobath/pipeline/prediction.hpp>
#include <isobath/pipeline/quantize.hpp>
#include <isobath/pipeline/row_grouping.hpp>
#include <isobath/pipeline/tune.hpp>
#include <isobath/pipeline/validate.hpp>
#include <isobath/pipeline/versions.hpp>
#include <isobath/report/progress.hpp>
#include <isobath/report/table.hpp>
#include <nlohmann/json.hpp>

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;

// What the closing table tells; stages that did not run stay empty.
struct Closing {
  std::optional<MeasureResult> measured;
  std::optional<QuantizeResult> quantized;
  std::optional<TuneResult> tuned;
  std::optional<evaluate::Summary> evaluated;
};

// "210 linears at 3", or "90 linears at 2, 120 at 4" for mixed widths.
std::string widths_text(const QuantizeResult& result) {
  std::string text;
  for (const auto& [bits, n_modules] : result.modules_of_width)
    text += fmt::format("{}{} {}at {}", text.empty() ? "" : ", ", n_modules, text.empty() ? "linears " : "",
                        bits);
  return text;
}

// "D measured again before blocks 5, 10 (2 of 3 comparisons, cosine 0.91 to 0.98) in 41 s"; empty for none.
std::string reestimation_text(const Session& session, const QuantizeResult& result) {
  if (result.reestimations.empty()) return {};
  std::vector<int64_t> blocks;
  double wall_s = 0, least = 1, most = -1;
  for (const ReestimationRecord& record : result.reestimations) {
    if (record.refreshed) blocks.push_back(record.block);
    wall_s += record.wall_s;
    least = std::min(least, record.cosine);
    most = std::max(most, record.cosine);
  }
  std::string text = blocks.empty() ? "D never measured again"
                                    : fmt::format("D measured again before block{} {}",
                                                  blocks.size() == 1 ? "" : "s", fmt::join(blocks, ", "));
  if (session.config.quantization.reestimate.policy == "drift")
    text += fmt::format(" ({} of {} comparisons, cosine {:.4f} to {:.4f})", blocks.size(),
                        result.reestimations.size(), least, most);
  return text + fmt::format(" in {}\n", report::Progress::format_duration(wall_s));
}

std::string closing_table(const Session& session, const Closing& closing, const fs::path& run, double wall_s,
                          const comm::Communicator& world) {
  int64_t largest = peak_memory_bytes(), total = largest;
  largest = world.all_reduce(largest, comm::Reduce::max);
  total = world.all_reduce(total, comm::Reduce::sum);
  const int64_t of_device = world.all_reduce(comm::device_peak_bytes(session.device), comm::Reduce::max);
  const config::Quantization& q = session.config.quantization;
  report::Table table({"result", "original", "quantized"});
  if (closing.evaluated) {
    const evaluate::Summary& e = *closing.evaluated;
    table.add({"perplexity", fmt::format("{:.3f}", e.perplexity_original),
               e.has_quantized ? fmt::format("{:.3f}", e.perplexity) : "-"});
    if (e.has_quantized) {
      table.add({"KL to the original, mean (nats/token)", "0", fmt::format("{:.5f}", e.kl_mean)});
      table.add({"KL median / 99 %", "0", fmt::format("{:.5f} / {:.4f}", e.kl_median, e.kl_p99)});
      table.add({"top-1 agreement", "100 %", fmt::format("{:.2f} %", 100 * e.top1_agreement)});
    }
  }
  if (closing.quantized)
    table.add({"bits per weight, scales included",
               std::to_string(8 * c10::elementSize(session.model().dtype)),
               fmt::format("{:.3f}", closing.quantized->bits_per_weight)});
  std::string text = closing.evaluated || closing.quantized ? table.text() : std::string();
  if (closing.quantized)
    text += fmt::format("{} bits, group {}, {}, {}{}; {} fallbacks\n", widths_text(*closing.quantized),
                        q.group == 0 ? "channel" : std::to_string(q.group),
                        q.symmetric ? "symmetric" : "asymmetric", q.solver,
                        q.solver == "gptq"
                            ? " with D = " + std::string(q.weighting == "none" ? "1" : "sensitivity") +
                                  (q.is_asymmetric() ? ", correction " + q.asymmetric.correction : "") +
                                  (q.refinement.sweeps > 0 ? ", refined" : "")
                            : "",
                        closing.quantized->n_fallbacks) +
            reestimation_text(session, *closing.quantized);
  if (closing.tuned)
    text += fmt::format("scales tuned in {} steps: KL {:.4f} to {:.4f} on the calibration tokens\n",
                        closing.tuned->n_steps, closing.tuned->kl_first, closing.tuned->kl_last);
  std::string times;
  const auto add_time = [&](const char* stage, double seconds) {
    times +=
        fmt::format("{}{} {}", times.empty() ? "" : ", ", stage, report::Progress::format_duration(seconds));
  };
  if (closing.measured) add_time("measure", closing.measured->wall_s);
  if (closing.quantized) add_time("quantize", closing.quantized->wall_s);
  if (closing.tuned) add_time("tune", closing.tuned->wall_s);
  constexpr double kGiB = 1 << 30;
  text +=
      fmt::format("time {}{}; {} rank{}, peak memory per rank {:.2f} GiB (largest), {:.2f} GiB (mean){}\n",
                  report::Progress::format_duration(wall_s), times.empty() ? "" : " (" + times + ")",
                  world.size(), world.size() == 1 ? "" : "s", static_cast<double>(largest) / kGiB,
                  static_cast<double>(total) / world.size() / kGiB,
                  session.device.is_cuda()
                      ? fmt::format(", tensors on a device {:.2f} GiB", static_cast<double>(of_device) / kGiB)
                      : "");
  if (!run.empty()) text += fmt::format("in {}\n", run.string());
  return text;
}

bool contains(const std::vector<Stage>& stages, Stage stage) {
  return std::ranges::find(stages, stage) != stages.end();
}

void require_finished(const checkpoint::RunDirectory& run, const std::string& stage,
                      const comm::Communicator& world) {
  world.agree(run.is_complete(stage)
                  ? ""
                  : fmt::format("{} has no finished {} stage; start `isobath {}` or `isobath run` first",
                                run.path().string(), stage, stage),
              ExitCode::config);
}

const char* name_of(Stage stage) {
  switch (stage) {
    case Stage::measure:
      return "measure";
    case Stage::quantize:
      return "quantize";
    case Stage::evaluate:
      return "evaluate";
  }
  return "";
}

/// Whether the evaluation that the configuration asks for is there. windows: nothing where it asks for none.
bool is_evaluated(const checkpoint::RunDirectory& run, const std::optional<data::TokenSet>& windows,
                  const comm::Communicator& world) {
  if (!run.is_complete("evaluate")) return false;
  if (!windows) return true;
  const fs::path file = run.path() / "evaluation.json";
  bool is_there = false;
  world.agree_on([&] {
    is_there = world.rank() == 0 && fs::exists(file) && is_evaluation_on(io::read_text(file), *windows);
  });
  return world.any(is_there);
}

// A stage command on a directory where that stage is done would do nothing: say so, as an error unless
// --resume asked for it.
void refuse_or_note_finished(const checkpoint::RunDirectory& run, const std::vector<Stage>& stages,
                             bool is_evaluated, bool resume, const comm::Communicator& world) {
  for (const Stage stage : stages)
    if (stage == Stage::evaluate ? !is_evaluated : !run.is_complete(name_of(stage))) return;
  const std::string text = fmt::format("{}: {} is finished", run.path().string(), name_of(stages.back()));
  world.agree(resume ? "" : text + "; choose another `output`", ExitCode::config);
  log::info("{}; nothing is left to do", text);
}

// A stage that continues what an earlier one left needs a run to be there.
void require_run(const fs::path& run, Stage first, const comm::Communicator& world) {
  if (world.any(fs::exists(run / "run.json"))) return;
  world.agree(
      first == Stage::evaluate
          ? fmt::format("{} holds no run to evaluate; start `isobath run` first, or name a model with "
                        "--checkpoint",
                        run.string())
          : fmt::format("{} holds no run: `isobath {}` takes up what a stage before it left; start "
                        "`isobath measure` or `isobath run` first",
                        run.string(), name_of(first)),
      ExitCode::config);
}

// Threads of a rank, where the configuration leaves them to the program: those of the run that is continued,
// whose results may depend on them; 0 where there is none. Warns where a rank has fewer cores.
int recorded_threads(const fs::path& run, const comm::Communicator& world) {
  int threads = 0;
  if (world.rank() == 0) {
    const checkpoint::Fingerprint recorded = checkpoint::recorded_fingerprint(run);
    if (const auto found = recorded.find(kThreadsOfFingerprint); found != recorded.end())
      threads = std::atoi(found->second.c_str());
  }
  threads = world.all_reduce(threads, comm::Reduce::max);
  const int cores = world.all_reduce(comm::cores_of(world.node()).per_rank, comm::Reduce::min);
  if (threads > std::max(1, cores))
    log::warning(
        "{} was made with {} threads a rank, and is continued with as many, on {} core{} a rank: its bytes "
        "may "
        "depend on them",
        run.string(), threads, std::max(1, cores), cores > 1 ? "s" : "");
  return threads;
}

}  // namespace

void run(const config::RunConfig& given, const std::vector<Stage>& stages, bool resume,
         const comm::Communicator& world) {
  const Timer timer;
  config::RunConfig config = given;
  comm::Watchdog::configure(std::chrono::seconds(config.ranks.watchdog_s));

  // The first stage makes the run directory; the later ones continue in it.
  const bool is_weighted =
      config.quantization.weighting == "sensitivity" && config.quantization.solver != "round_to_nearest";
  const bool needs_measure = is_weighted && config.sensitivity.reuse.empty();
  const bool creates = !resume && (contains(stages, Stage::measure) ||
                                   (contains(stages, Stage::quantize) && !needs_measure &&
                                    !world.any(fs::exists(fs::path(config.output) / "run.json"))));
  if (!creates && !resume) require_run(config.output, stages.front(), world);
  if (!creates && config.ranks.threads == 0) config.ranks.threads = recorded_threads(config.output, world);

  // Who computes what: model headers, grid, tokens.                                     no weights in memory
  // yet
  const data::ShardPlan plan(config.calibration.sequences, config.calibration.logical_shards,
                             config.calibration.microbatch);
  const Session session = open_session(config, static_cast<int64_t>(plan.microbatches().size()), world);
  world.agree_on([&] {
    require_quantizable(config, session.model());
    require_allocated(config, *session.source);
  });
  const CalibrationSet calibration = open_calibration(session);
  std::optional<data::TokenSet> windows;  // refused now, not when the model is quantized
  if (contains(stages, Stage::evaluate) && !config.evaluation.tokens.empty())
    windows = open_evaluation(session);
  std::vector<std::shared_ptr<const model::CheckpointReader>> perturbed;
  if (creates) perturbed = open_perturbed_versions(session);
  Prediction prediction(session);
  const checkpoint::Fingerprint fingerprint = fingerprint_of(session, calibration);

  checkpoint::RunDirectory directory(
      config.output,
      creates ? checkpoint::RunDirectory::Mode::create : checkpoint::RunDirectory::Mode::resume, fingerprint,
      world);
  report::EventLog events =
      world.rank() == 0 ? report::EventLog(directory.path() / "events.jsonl") : report::EventLog();
  events.write("start", {{"ranks", world.size()},
                         {"stages", session.grid->shape().stages},
                         {"replicas", session.grid->shape().replicas},
                         {"threads", session.threads},
                         {"resume", resume}});
  const bool has_evaluation = is_evaluated(directory, windows, world);
  if (!creates) refuse_or_note_finished(directory, stages, has_evaluation, resume, world);

  // W: each rank reads the weights of its own blocks, now or when they are needed.      sharded by stage
  const Timer loading;
  model::WeightStore weights = open_weights(session, session.source);
  prediction.record("load", loading.seconds(), events);
  Closing closing;

  // §1  D_l, α_l = sensitivity of every linear on the calibration tokens                files, one a block
  fs::path statistics = directory.path() / "measure";
  if (!config.sensitivity.reuse.empty()) {
    statistics = config.sensitivity.reuse;
    world.agree_on([&] {
      require_header("sensitivity.reuse", statistics, statistics_header(session, calibration),
                     session.model().n_blocks);
    });
  }
  const bool is_measured = !config.sensitivity.reuse.empty() || directory.is_complete("measure");
  const bool is_measure_alone = stages.size() == 1;
  if (contains(stages, Stage::measure) && !is_measured && (is_weighted || is_measure_alone)) {
    const Timer measuring;
    MeasurePass pass{.title = "measure", .source = {}, .directory = statistics, .with_perturbations = true};
    pass.perturbed_versions = creates ? std::move(perturbed) : open_perturbed_versions(session);
    if (clusters_rows(config.sensitivity))
      pass.row_groups = measure_row_groups(session, calibration, weights, events);
    closing.measured = measure(session, calibration, weights, pass, events);
    closing.measured->wall_s = measuring.seconds();
    prediction.record("measure", closing.measured->wall_s, events);
    directory.mark_complete("measure");
    return_free_memory();  // quantize's peak is its own, not on top of this one's
    log::info("measured {} tokens in {}: {:.4f} nats per token", closing.measured->loss.n_tokens,
              report::Progress::format_duration(closing.measured->wall_s), closing.measured->loss.nll_per_token);
  }

  // §3  W_l -> grid, block by block, H = XᵀDX of the quantized prefix's activations      model/, one shard a
  // block
  const fs::path quantized = directory.path() / "model";
  if (contains(stages, Stage::quantize) && !directory.is_complete("quantize")) {
    if (needs_measure) require_finished(directory, "measure", world);
    // A crash between the last rename and its mark leaves a whole model: it is taken as it is.
    const auto is_whole = [&](const fs::path& model) { return world.any(fs::exists(model / "config.json")); };
    const fs::path untuned = directory.path() / quantized_name(config);
    if (!is_whole(untuned) && !is_whole(quantized))
      closing.quantized =
          quantize(session, calibration, weights, statistics, directory, fingerprint, true, events);
    if (closing.quantized) prediction.record("quantize", closing.quantized->wall_s, events);
    return_free_memory();
    // The scales again, all at once, by the loss of the whole model                      model/, once more
    if (!is_whole(quantized)) {
      closing.tuned = tune_scales(session, calibration, std::move(weights), untuned, directory.path(),
                                  fingerprint, events);
      if (contains(stages, Stage::evaluate)) weights = open_weights(session, session.source);
      prediction.record("tune", closing.tuned->wall_s, events);
      return_free_memory();
    }
    directory.mark_complete("quantize");
    // Nothing will be resumed from a saved state again.
    std::error_code ignored;
    if (world.rank() == 0) {
      fs::remove_all(directory.path() / "checkpoint", ignored);
      if (untuned != quantized) fs::remove_all(untuned, ignored);
    }
  }

  // §8  what it cost: perplexity, KL, agreement                                          evaluation.json
  if (contains(stages, Stage::evaluate) && !has_evaluation) {
    require_finished(directory, "quantize", world);
    if (windows) {
      const Timer evaluating;
      closing.evaluated = evaluate_model(session, *windows, weights, {quantized}, events)[0];
      prediction.record("evaluate", evaluating.seconds(), events);
      world.agree_on([&] {
        if (world.rank() == 0)
          io::write_text_atomically(directory.path() / "evaluation.json",
                                    evaluation_json(*closing.evaluated, *windows));
      });
    }
    directory.mark_complete("evaluate");
  }

  const std::string table =
      closing_table(session, closing, directory.path(), timer.seconds(), world) + prediction.text();
  log::print(table);
  events.write("finished", {{"seconds", timer.seconds()}, {"summary", table}});
}

void evaluate_checkpoints(const config::RunConfig& config, const std::vector<fs::path>& quantized,
                          const fs::path& json_output, const comm::Communicator& world) {
  const Timer timer;
  comm::Watchdog::configure(std::chrono::seconds(config.ranks.watchdog_s));
  world.agree(config.evaluation.tokens.empty()
                  ? "evaluation.tokens is not set; name a token file to evaluate on"
                  : "",
              ExitCode::config);
  const Session session = open_session(config, config.evaluation.windows, world);
  const data::TokenSet windows = open_evaluation(session);
  const model::WeightStore weights = open_weights(session, session.source);
  report::EventLog events;
  Closing closing;
  const std::vector<evaluate::Summary> summaries =
      evaluate_model(session, windows, weights, quantized, events);
  world.agree_on([&] {
    if (world.rank() == 0 && !json_output.empty())
      io::write_text_atomically(json_output, quantized.size() > 1
                                                 ? evaluations_json(quantized, summaries, windows)
                                                 : evaluation_json(summaries[0], windows));
  });
  if (quantized.size() > 1) {
    report::Table table({"checkpoint", "perplexity", "KL mean", "KL median", "KL 99 %", "top-1 agreement"});
    table.add({config.model, fmt::format("{:.3f}", summaries[0].perplexity_original), "-", "-", "-", "-"});
    for (size_t i = 0; i < quantized.size(); ++i) {
      const evaluate::Summary& e = summaries[i];
      table.add({quantized[i].string(), fmt::format("{:.3f}", e.perplexity), fmt::format("{:.5f}", e.kl_mean),
                 fmt::format("{:.5f}", e.kl_median), fmt::format("{:.4f}", e.kl_p99),
                 fmt::format("{:.2f} %", 100 * e.top1_agreement)});
    }
    log::print(table.text());
  } else {
    closing.evaluated = summaries[0];
  }
  log::print(closing_table(session, closing, {}, timer.seconds(), world));
}

}  // namespace isobath::pipeline
