#include <isobath/pipeline/quantize.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/device_communicator.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/digest.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/io/files.hpp>
#include <isobath/pipeline/hidden_streams.hpp>
#include <isobath/pipeline/model_output.hpp>
#include <isobath/pipeline/reestimation.hpp>
#include <isobath/report/progress.hpp>
#include <nlohmann/json.hpp>

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;
using model::Projection;

nlohmann::json to_json(const ModuleRecord& record) {
  nlohmann::json json = {{"module", record.module},
                         {"bits", record.bits},
                         {"group", record.group},
                         {"weighting", record.weighting},
                         {"damping", record.damping},
                         {"fallbacks", record.n_fallbacks},
                         {"effective_samples_per_channel", record.effective_samples_per_channel},
                         {"objective_round_to_nearest", record.objective_rounded},
                         {"objective", record.objective},
                         {"bits_per_weight", record.bits_per_weight}};
  if (record.objective_asymmetric) json["objective_asymmetric"] = *record.objective_asymmetric;
  if (record.shrinkage > 0) json["shrinkage"] = record.shrinkage;
  return json;
}

// One behind the last block with a linear to solve; 0 for round-to-nearest, which looks at weights only.
int64_t blocks_to_travel(const Session& session) {
  const config::Quantization& quantization = session.config.quantization;
  int64_t n_blocks = quantization.solver == "round_to_nearest" ? 0 : session.model().n_blocks;
  const auto is_solved = [&](int64_t block) {
    for (int p = 0; p < model::kProjections; ++p)
      if (choice_for(quantization, model::module_name(block, static_cast<Projection>(p))).quantized)
        return true;
    return false;
  };
  while (n_blocks > 0 && !is_solved(n_blocks - 1)) --n_blocks;
  return n_blocks;
}

class QuantizePass {
 public:
  QuantizePass(const Session& session, const CalibrationSet& calibration, const StageWeights& weights,
               const fs::path& statistics, checkpoint::RunDirectory& run,
               const checkpoint::Fingerprint& fingerprint, report::EventLog& events)
      : session_(session),
        calibration_(calibration),
        stage_weights_(weights),
        run_(run),
        events_(events),
        generations_(run.path() / "checkpoint", session.config.checkpoint.keep, fingerprint, session.world()),
        output_(session, run.path()),
        solver_(session, calibration),
        device_comm_(session.world(), session.device),
        n_travelled_(blocks_to_travel(session)),
        streams_(session, calibration, session.config.quantization.asymmetric.is_on()),
        is_weighted_(n_travelled_ > 0 && session.config.quantization.weighting == "sensitivity"),
        reestimation_(session, calibration, weights, statistics, run.path(), events) {
    state_.stage = "quantize";
    state_.seed = session.config.calibration.seed;
  }

  QuantizeResult run(bool resume) {
    const Timer timer;
    begin(resume);
    {
      report::Progress progress("quantize", session_.model().n_blocks - state_.next_block, "blocks", 0,
                                session_.world().rank() == 0);
      while (state_.next_block < session_.model().n_blocks) {
        const int64_t block = state_.next_block;
        comm::Watchdog::set_activity(fmt::format("quantize, block {}", block));
        if (is_weighted_ && block < n_travelled_) reestimation_.before_block(block, streams_, state_);
        quantize_block(block, progress);
        progress.advance();
        save_if_due();
      }
    }
    return finish(timer);
  }

 private:
  void begin(bool resume) {
    std::optional<checkpoint::Generation> generation;
    if (resume) generation = generations_.open_latest(output_.partial_directory());
    if (generation) {
      state_ = generation->state();
      log::info("resuming quantize at block {} from generation {}", state_.next_block, generation->number());
      // Behind the last linear to quantize no hidden states are needed, and none are saved.
      if (state_.next_block < n_travelled_) session_.world().agree_on([&] { streams_.restore(*generation); });
      return;
    }
    session_.world().agree_on([&] {
      if (session_.world().rank() == 0) fs::remove_all(output_.partial_directory());
    });
    new_outputs_ = output_.write_outside_blocks();
    if (n_travelled_ > 0) embed_tokens();
  }

  void embed_tokens() {
    const at::NoGradGuard no_grad;
    // The first stage holds the embedding; every rank needs its own rows once.
    const model::ModelConfig& model = session_.model();
    at::Tensor embedding = stage_weights_.embedding.defined()
                               ? stage_weights_.embedding
                               : at::empty({model.vocab_size, model.d_model},
                                           at::TensorOptions().dtype(session_.dtype).device(session_.device));
    device_comm_.broadcast(embedding, session_.grid->world_rank(0, 0));
    streams_.embed(embedding);
  }

  [[nodiscard]] int owner_of_block(int64_t block) const {
    return session_.grid->world_rank(session_.stage_of(block), 0);
  }

  // Every rank works on every block: its owner sends the weights to all.
  [[nodiscard]] model::BlockWeights share_block(int64_t block) const {
    const trace::Span span("weights to all ranks", block);
    const model::ModelConfig& model = session_.model();
    const int owner = owner_of_block(block);
    const auto options = at::TensorOptions().dtype(session_.dtype).device(session_.device);
    model::BlockWeights shared;
    const auto found = stage_weights_.blocks.find(block);
    if (found != stage_weights_.blocks.end()) shared = found->second;
    const auto share = [&](at::Tensor& tensor, at::IntArrayRef shape) {
      if (!tensor.defined()) tensor = at::empty(shape, options);
      device_comm_.broadcast(tensor, owner);
    };
    share(shared.input_norm, {model.d_model});
    share(shared.post_attention_norm, {model.d_model});
    for (int p = 0; p < model::kProjections; ++p) {
      const model::ModuleShape shape = model::module_shape(model, static_cast<Projection>(p));
      share(shared[static_cast<Projection>(p)].weight, {shape.rows, shape.columns});
      if (shape.has_bias) share(shared[static_cast<Projection>(p)].bias, {shape.rows});
    }
    return shared;
  }

  [[nodiscard]] quant::GridSpec grid_of(const config::ModuleChoice& choice) const {
    const config::Quantization& quantization = session_.config.quantization;
    return {.bits = choice.bits,
            .group = choice.group,
            .symmetric = quantization.symmetric,
            .clip_search = quantization.clip_search,
            .storage = session_.model().dtype};
  }

  void quantize_block(int64_t block, report::Progress& progress) {
    const trace::Span span("quantize block", block);
    const at::NoGradGuard no_grad;
    const Timer timer;
    model::BlockWeights weights = share_block(block);
    std::array<at::Tensor, model::kProjections> token_weights;
    if (is_weighted_)
      session_.world().agree_on(
          [&] { token_weights = read_token_weights(reestimation_.statistics(state_), block); });

    const bool travels = block < n_travelled_;
    if (travels) streams_.enter_block(weights);
    matrices_.clear();
    std::vector<ModuleRecord> records;
    for (int set = 0; set < model::kInputSets; ++set) {
      std::vector<SolveTask> tasks;
      for (const Projection projection : model::input_set(set)) {
        const auto choice =
            config::choice_for(session_.config.quantization, model::module_name(block, projection));
        if (choice.quantized)
          tasks.push_back({projection, grid_of(choice), token_weights[static_cast<size_t>(projection)]});
      }
      if (!tasks.empty()) {
        std::vector<Solved> solved = travels
                                         ? solver_.solve(block, tasks, weights, streams_.inputs(set, weights))
                                         : round_set(block, tasks, weights);
        for (size_t t = 0; t < tasks.size(); ++t) {
          // What follows sees the weights that a loader will see.
          weights[tasks[t].projection].weight =
              quant::dequantize(solved[t].matrix).to(session_.dtype).to(session_.device);
          records.push_back(solved[t].record);
          matrices_.emplace(tasks[t].projection, std::move(solved[t].matrix));
        }
      }
      if (travels) streams_.advance(set, weights, block);
    }
    require_same_codes(block);
    write_block(block);
    report_block(block, records, travels ? streams_.deviation() : std::nullopt, timer.seconds(), progress);
    state_.next_block = block + 1;
  }

  // Silent differences between ranks are the worst failure of a distributed quantizer: every block is
  // compared.
  void require_same_codes(int64_t block) const {
    Digest digest;
    for (const auto& [projection, matrix] : matrices_)
      digest.update(matrix.codes).update(matrix.scale).update(matrix.zero);
    const std::vector<std::string> all = session_.world().all_gather(digest.hex());
    for (size_t rank = 1; rank < all.size(); ++rank)
      if (all[rank] != all[0])
        session_.world().agree(
            fmt::format("block {}: rank {} holds other codes than rank 0 (digests {} and {}); results "
                        "of this job cannot be trusted",
                        block, rank, all[rank], all[0]),
            ExitCode::internal);
  }

  void write_block(int64_t block) {
    const trace::Span span("write block", block);
    session_.world().agree_on([&] {
      if (session_.world().rank() == owner_of_block(block))
        new_outputs_.push_back(output_.write_block(block, matrices_));
    });
  }

  void report_block(int64_t block, const std::vector<ModuleRecord>& records, std::optional<double> deviation,
                    double wall_s, report::Progress& progress) {
    double before = 0, after = 0;
    for (const ModuleRecord& record : records) {
      state_.bits[record.module] = record.bits;
      nlohmann::json event = to_json(record);
      if (is_weighted_ && state_.sensitivity_from_block >= 0)
        event["measured_before_block"] = state_.sensitivity_from_block;
      state_.module_records.push_back(event.dump());
      event["seconds"] = record.wall_s;
      events_.write("module", event);
      log::debug("  {}: {} bits, damping {:g}, n_eff/d {:.1f}, objective {:.4g} -> {:.4g}, {:.2f} s",
                 record.module, record.bits, record.damping, record.effective_samples_per_channel,
                 record.objective_rounded, record.objective, record.wall_s);
      before += record.objective_rounded;
      after += record.objective;
    }
    progress.note(fmt::format("block {}/{}: {} linears, objective {:.4g} -> {:.4g}, {:.1f} s", block + 1,
                              session_.model().n_blocks, records.size(), before, after, wall_s));
    nlohmann::json event = {
        {"block", block}, {"seconds", wall_s}, {"objective_round_to_nearest", before}, {"objective", after}};
    if (deviation) event["deviation"] = *deviation;
    events_.write("block", event);
  }

  void save_if_due() {
    const bool stop = session_.world().any(stop_requested());
    const int64_t every = session_.config.checkpoint.every_blocks;
    const bool is_last = state_.next_block == session_.model().n_blocks;
    if (stop || is_last || state_.next_block % every == 0) {
      std::vector<std::pair<std::string, at::Tensor>> tensors;
      if (state_.next_block < n_travelled_) tensors = streams_.state();
      const Timer timer;
      const trace::Span span("checkpoint", state_.next_block);
      generations_.commit(state_, tensors, output_.partial_directory(), new_outputs_);
      new_outputs_.clear();
      events_.write("checkpoint", {{"next_block", state_.next_block}, {"seconds", timer.seconds()}});
    }
    if (stop && !is_last)
      fail<StopRequested>("stopped on request after block {} of {}; `--resume` continues there",
                          state_.next_block, session_.model().n_blocks);
  }

  QuantizeResult finish(const Timer& timer) {
    std::map<std::string, quant::GridSpec> modules;
    std::vector<std::string> ignored{"lm_head"};
    QuantizeResult result;
    double bits = 0, n_weights = 0;
    for (int64_t block = 0; block < session_.model().n_blocks; ++block) {
      for (int p = 0; p < model::kProjections; ++p) {
        const auto projection = static_cast<Projection>(p);
        const std::string module = model::module_name(block, projection);
        const auto choice = config::choice_for(session_.config.quantization, module);
        if (!choice.quantized) {
          ignored.push_back(module);
          continue;
        }
        modules[module] = grid_of(choice);
        const model::ModuleShape shape = model::module_shape(session_.model(), projection);
        const double n = static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
        bits += n * quant::bits_per_weight(shape.columns, modules[module]);
        n_weights += n;
        ++result.n_modules;
        ++result.modules_of_width[choice.bits];
      }
    }
    nlohmann::json records = nlohmann::json::array();
    for (const std::string& record : state_.module_records) {
      records.push_back(nlohmann::json::parse(record));
      result.n_fallbacks += records.back()["fallbacks"].get<int64_t>();
    }
    nlohmann::json reestimations = nlohmann::json::array();
    for (const std::string& record : state_.reestimations) {
      reestimations.push_back(nlohmann::json::parse(record));
      result.reestimations.push_back({.block = reestimations.back()["block"].get<int64_t>(),
                                      .cosine = reestimations.back().value("cosine", 0.0),
                                      .refreshed = reestimations.back()["refreshed"].get<bool>(),
                                      .wall_s = reestimations.back().value("seconds_of_check", 0.0) +
                                                reestimations.back().value("seconds_of_refresh", 0.0)});
    }
    session_.world().agree_on([&] {
      if (session_.world().rank() != 0) return;
      io::write_text_atomically(run_.path() / "modules.json", records.dump(1) + "\n");
      if (!reestimations.empty())
        io::write_text_atomically(run_.path() / "reestimations.json", reestimations.dump(1) + "\n");
    });
    output_.finish(modules, ignored);
    result.bits_per_weight = n_weights > 0 ? bits / n_weights : 0;
    result.wall_s = timer.seconds();
    events_.write("quantized", {{"seconds", result.wall_s},
                                {"bits_per_weight", result.bits_per_weight},
                                {"modules", result.n_modules},
                                {"fallbacks", result.n_fallbacks}});
    return result;
  }

  const Session& session_;
  const CalibrationSet& calibration_;
  const StageWeights& stage_weights_;
  checkpoint::RunDirectory& run_;
  report::EventLog& events_;
  checkpoint::GenerationStore generations_;
  ModelOutput output_;
  BlockSolver solver_;
  comm::DeviceCommunicator device_comm_;
  int64_t n_travelled_;  // blocks that hidden states pass through: up to the last to solve
  HiddenStreams streams_;
  bool is_weighted_;  // D weights H, so there is something to estimate again
  Reestimation reestimation_;
  checkpoint::RunState state_;
  std::map<Projection, quant::QuantizedMatrix> matrices_;  // of the block in work
  std::vector<std::string> new_outputs_;
};

}  // namespace

QuantizeResult quantize(const Session& session, const CalibrationSet& calibration,
                        const StageWeights& weights, const fs::path& statistics,
                        checkpoint::RunDirectory& run, const checkpoint::Fingerprint& fingerprint,
                        bool resume, report::EventLog& events) {
  return QuantizePass(session, calibration, weights, statistics, run, fingerprint, events).run(resume);
}

}  // namespace isobath::pipeline
