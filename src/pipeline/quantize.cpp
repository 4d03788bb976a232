#include <isobath/pipeline/quantize.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <future>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/digest.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/io/files.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/checkpoint_pace.hpp>
#include <isobath/pipeline/hidden_streams.hpp>
#include <isobath/pipeline/model_output.hpp>
#include <isobath/pipeline/reestimation.hpp>
#include <isobath/pipeline/row_grouping.hpp>
#include <isobath/report/progress.hpp>
#include <nlohmann/json.hpp>

#include "quantize_summary.hpp"

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;
using model::Projection;

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

// Of one saved state, all ranks: the hidden states of every sequence.
double state_bytes(const Session& session, const CalibrationSet& calibration) {
  const double streams = session.config.quantization.is_asymmetric() ? 2 : 1;
  return streams * static_cast<double>(calibration.tokens.tokens.numel() * session.model().d_model) *
         static_cast<double>(c10::elementSize(session.dtype));
}

class QuantizePass {
 public:
  QuantizePass(const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
               const fs::path& statistics, checkpoint::RunDirectory& run,
               const checkpoint::Fingerprint& fingerprint, report::EventLog& events)
      : session_(session),
        calibration_(calibration),
        stage_weights_(weights),
        run_(run),
        events_(events),
        generations_(run.path() / "checkpoint", session.config.checkpoint.keep, fingerprint, session.world()),
        output_(session, run.path(), quantized_name(session.config)),
        solver_(session, calibration),
        n_travelled_(blocks_to_travel(session)),
        streams_(session, calibration, session.config.quantization.is_asymmetric()),
        is_weighted_(n_travelled_ > 0 && session.config.quantization.weighting == "sensitivity"),
        reestimation_(session, calibration, weights, statistics, run.path(), events),
        pace_(session.config.checkpoint.every_blocks, state_bytes(session, calibration)) {
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
      if (session_.world().rank() != 0) return;
      output_.start();
      writing_ = std::async(std::launch::async, [this] { return output_.write_outside_blocks(); });
    });
    if (n_travelled_ > 0) embed_tokens();
  }

  void embed_tokens() {
    const at::NoGradGuard no_grad;
    // The first stage holds the embedding; every rank needs the rows of its own tokens once. Those of all
    // tokens that occur go to all.
    const int owner = session_.grid->world_rank(0, 0);
    const bool is_mine = session_.world().rank() == owner || all_ranks_hold_all();
    const auto [occurring, place] =
        at::_unique(calibration_.tokens.tokens.to(at::kLong), /*sorted=*/true, /*return_inverse=*/true);
    at::Tensor rows;
    session_.world().agree_on([&] {
      if (is_mine) rows = model::embed(stage_weights_.embedding(), occurring.to(session_.device));
    });
    if (!rows.defined())
      rows = at::empty({occurring.numel(), session_.model().d_model},
                       at::TensorOptions().dtype(session_.dtype).device(session_.device));
    if (!all_ranks_hold_all()) session_.devices->broadcast(rows, owner);
    streams_.embed(rows, place);
  }

  // Resident replicas of the whole model: no weights need travel.
  [[nodiscard]] bool all_ranks_hold_all() const {
    return !stage_weights_.is_streamed() && session_.grid->shape().stages == 1;
  }

  [[nodiscard]] int owner_of_block(int64_t block) const {
    return session_.grid->world_rank(session_.stage_of(block), 0);
  }

  // Every rank works on every block: its owner sends the weights to all that may not hold them.
  void start_sharing(int64_t block) {
    const model::ModelConfig& model = session_.model();
    const int owner = owner_of_block(block);
    const auto options = at::TensorOptions().dtype(session_.dtype).device(session_.device);
    const bool is_next_mine =
        block + 1 < model.n_blocks && session_.world().rank() == owner_of_block(block + 1);
    const bool is_mine = session_.world().rank() == owner || stage_weights_.holds(block);
    arriving_.block = block;
    arriving_.weights = take_block(session_, stage_weights_, block, is_mine, is_next_mine ? block + 1 : -1);
    if (all_ranks_hold_all()) return;
    const auto share = [&](at::Tensor& tensor, at::IntArrayRef shape) {
      if (!tensor.defined()) tensor = at::empty(shape, options);
      arriving_.transfers.push_back(session_.devices->broadcast_async(tensor, owner));
    };
    share(arriving_.weights.input_norm, {model.d_model});
    share(arriving_.weights.post_attention_norm, {model.d_model});
    if (model.head_norms) {
      share(arriving_.weights.q_norm, {model.head_dim});
      share(arriving_.weights.k_norm, {model.head_dim});
    }
    for (int p = 0; p < model::kProjections; ++p) {
      const model::ModuleShape shape = model::module_shape(model, static_cast<Projection>(p));
      model::Linear& linear = arriving_.weights[static_cast<Projection>(p)];
      share(linear.weight, {shape.rows, shape.columns});
      if (shape.has_bias) share(linear.bias, {shape.rows});
    }
  }

  void wait_for_weights() {
    for (comm::DeviceCommunicator::Transfer& transfer : arriving_.transfers) transfer.wait();
    arriving_.transfers.clear();
  }

  // Resident weights of the next block travel while this one is in work; streamed ones are being read.
  [[nodiscard]] model::BlockWeights share_block(int64_t block) {
    const trace::Span span("weights to all ranks", block);
    if (arriving_.block != block) start_sharing(block);
    wait_for_weights();
    model::BlockWeights weights = std::move(arriving_.weights);
    arriving_ = {};
    if (!stage_weights_.is_streamed() && block + 1 < session_.model().n_blocks) start_sharing(block + 1);
    return weights;
  }

  void quantize_block(int64_t block, report::Progress& progress) {
    const trace::Span span("quantize block", block);
    const at::NoGradGuard no_grad;
    const Timer timer;
    model::BlockWeights weights = share_block(block);
    std::array<at::Tensor, model::kProjections> token_weights;
    BlockRowGroups row_groups;
    if (is_weighted_) {
      const trace::Span reading("read token weights", block);
      session_.world().agree_on([&] {
        const fs::path statistics = reestimation_.statistics(state_);
        token_weights = read_token_weights(statistics, block);
        row_groups = row_groups_in(session_, statistics, block);
      });
    }

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
          tasks.push_back({projection, grid_of(session_, choice),
                           token_weights[static_cast<size_t>(projection)],
                           row_groups[static_cast<size_t>(projection)]});
      }
      if (!tasks.empty()) {
        std::vector<Solved> solved = travels
                                         ? solver_.solve(block, tasks, weights, streams_.inputs(set, weights))
                                         : round_set(block, tasks, weights);
        const trace::Span values("dequantize", set);
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
    report_block(block, records, travels, timer.seconds(), progress);
    state_.next_block = block + 1;
  }

  // Silent differences between ranks are the worst failure of a distributed quantizer: every block is
  // compared.
  void require_same_codes(int64_t block) const {
    const trace::Span span("compare codes", block);
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

  // All ranks hold the codes: they take turns in packing and writing, each in a thread of its own while the
  // next block is in work.
  void write_block(int64_t block) {
    finish_writing();
    const comm::Communicator& world = session_.world();
    if (world.rank() != block % world.size()) return;
    writing_ = std::async(std::launch::async, [this, block, matrices = std::move(matrices_)] {
      return output_.write_block(block, matrices);
    });
  }

  // Collective: the failure of a thread that writes is one on all ranks.
  void finish_writing() {
    const trace::Span span("wait for a block to be written");
    session_.world().agree_on([&] {
      if (writing_.valid()) new_outputs_.push_back(writing_.get());
    });
  }

  void report_block(int64_t block, const std::vector<ModuleRecord>& records, bool travels, double wall_s,
                    report::Progress& progress) {
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
    }
    BlockRecord of_block = block_record(block, records);
    if (travels) {
      of_block.deviation = streams_.deviation();
      of_block.loss = reestimation_.loss_before(block + 1, streams_);
    }
    std::string note = fmt::format("block {}/{}: {} linears, objective {:.4g} -> {:.4g}, {:.1f} s", block + 1,
                                   session_.model().n_blocks, records.size(), of_block.objective_rounded,
                                   of_block.objective, wall_s);
    if (of_block.loss) note += fmt::format(", KL so far {:.4f}", of_block.loss->kl_per_token.value_or(0));
    progress.note(note);
    nlohmann::json event = to_json(of_block);
    state_.block_records.push_back(event.dump());
    event["seconds"] = wall_s;
    events_.write("block", event);
  }

  void save_if_due() {
    const bool stop = session_.world().any(stop_requested());
    const bool is_last = state_.next_block == session_.model().n_blocks;
    // The first rank's clock decides for all.
    const bool is_due = session_.world().any(session_.world().rank() == 0 &&
                                             pace_.is_due(state_.next_block, since_saved_.seconds()));
    if (stop || is_last || is_due) {
      finish_writing();
      std::vector<std::pair<std::string, at::Tensor>> tensors;
      if (state_.next_block < n_travelled_) tensors = streams_.state();
      const Timer timer;
      const trace::Span span("checkpoint", state_.next_block);
      generations_.commit(state_, tensors, output_.partial_directory(), new_outputs_);
      new_outputs_.clear();
      pace_.saved(timer.seconds());
      since_saved_.restart();
      events_.write("checkpoint", {{"next_block", state_.next_block}, {"seconds", timer.seconds()}});
    }
    if (!stop || is_last) return;
    wait_for_weights();
    fail<StopRequested>("stopped on request after block {} of {}; `--resume` continues there",
                        state_.next_block, session_.model().n_blocks);
  }

  QuantizeResult finish(const Timer& timer) {
    OutputModules output = output_modules(session_);
    QuantizeResult& result = output.result;
    nlohmann::json records = nlohmann::json::array();
    for (const std::string& record : state_.module_records) {
      records.push_back(nlohmann::json::parse(record));
      result.n_fallbacks += records.back()["fallbacks"].get<int64_t>();
    }
    nlohmann::json reestimations = nlohmann::json::array(), blocks = reestimations;
    for (const std::string& record : state_.block_records) blocks.push_back(nlohmann::json::parse(record));
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
      io::write_text_atomically(run_.path() / "blocks.json", blocks.dump(1) + "\n");
      if (!reestimations.empty())
        io::write_text_atomically(run_.path() / "reestimations.json", reestimations.dump(1) + "\n");
    });
    output_.finish(output.grids, output.ignored);
    result.wall_s = timer.seconds();
    events_.write("quantized", {{"seconds", result.wall_s},
                                {"bits_per_weight", result.bits_per_weight},
                                {"modules", result.n_modules},
                                {"fallbacks", result.n_fallbacks}});
    return result;
  }

  const Session& session_;
  const CalibrationSet& calibration_;
  const model::WeightStore& stage_weights_;
  checkpoint::RunDirectory& run_;
  report::EventLog& events_;
  checkpoint::GenerationStore generations_;
  ModelOutput output_;
  BlockSolver solver_;
  int64_t n_travelled_;  // blocks that hidden states pass through: up to the last to solve
  HiddenStreams streams_;
  bool is_weighted_;  // D weights H, so there is something to estimate again
  Reestimation reestimation_;
  checkpoint::RunState state_;
  struct Arriving {
    int64_t block = -1;
    model::BlockWeights weights;
    std::vector<comm::DeviceCommunicator::Transfer> transfers;
  } arriving_;                                             // the block after the one in work
  std::map<Projection, quant::QuantizedMatrix> matrices_;  // of the block in work
  std::vector<std::string> new_outputs_;  // files of model.partial/ that no generation holds yet
  CheckpointPace pace_;
  Timer since_saved_;
  std::future<std::string> writing_;  // a file of model.partial/; its destructor waits for the thread
};

}  // namespace

const char* quantized_name(const config::RunConfig& config) {
  return config.quantization.tuning.epochs > 0 ? "model.untuned" : "model";
}

QuantizeResult quantize(const Session& session, const CalibrationSet& calibration,
                        const model::WeightStore& weights, const fs::path& statistics,
                        checkpoint::RunDirectory& run, const checkpoint::Fingerprint& fingerprint,
                        bool resume, report::EventLog& events) {
  return QuantizePass(session, calibration, weights, statistics, run, fingerprint, events).run(resume);
}

}  // namespace isobath::pipeline
