#include <isobath/pipeline/tune.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/pipeline/checkpoint_pace.hpp>
#include <isobath/pipeline/model_output.hpp>
#include <isobath/pipeline/original_outputs.hpp>
#include <isobath/pipeline/scale_gradients.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/pipeline/versions.hpp>
#include <nlohmann/json.hpp>

#include "measure_steps.hpp"
#include "quantize_summary.hpp"

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;

/// The logical shards of a part of an epoch: every n-th, so that all replicas have some.
std::vector<int64_t> shards_of_part(int64_t part, int64_t n_parts, int64_t n_shards) {
  std::vector<int64_t> shards;
  for (int64_t shard = part; shard < n_shards; shard += n_parts) shards.push_back(shard);
  return shards;
}

quant::QuantizedMatrix moved(const quant::QuantizedMatrix& matrix, c10::Device device) {
  return {.spec = matrix.spec,
          .codes = matrix.codes.to(device),
          .scale = matrix.scale.to(device),
          .zero = matrix.zero.to(device)};
}

class TunePass {
 public:
  TunePass(const Session& session, const CalibrationSet& calibration, model::WeightStore original,
           const fs::path& untuned, const fs::path& run, const checkpoint::Fingerprint& fingerprint,
           report::EventLog& events)
      : session_(session),
        calibration_(calibration),
        tuning_(session.config.quantization.tuning),
        n_shards_(calibration.shards.n_shards()),
        n_parts_(std::min(tuning_.steps, n_shards_)),
        n_steps_(tuning_.epochs * n_parts_),
        events_(events),
        untuned_(untuned),
        generations_(run / "checkpoint", session.config.checkpoint.keep, fingerprint, session.world()),
        // Before the original runs: what cannot be continued is refused at once.
        saved_(open_saved()),
        outputs_(outputs_of(session, calibration, std::move(original))),
        weights_(open_version(session, untuned)) {
    session.world().agree_on([&] {
      read_matrices();
      if (saved_->state().stage == kStage) restore(*saved_);
    });
    saved_.reset();
    state_.stage = kStage;
    state_.epoch_kl.resize(static_cast<size_t>(tuning_.epochs));
    state_.epoch_tokens.resize(static_cast<size_t>(tuning_.epochs));
    pace_ = CheckpointPace(session.config.checkpoint.every_blocks, state_bytes());
    since_epoch_.restart();
    since_saved_.restart();
  }

  TuneResult run() {
    while (state_.next_step < n_steps_) {
      const int64_t epoch = state_.next_step / n_parts_, part = state_.next_step % n_parts_;
      const auto of_epoch = static_cast<size_t>(epoch);
      comm::Watchdog::set_activity(
          fmt::format("tune scales, epoch {}, step {} of {}", epoch + 1, part + 1, n_parts_));
      const auto [kl, n_tokens] = step(part);
      state_.epoch_kl[of_epoch] += kl;
      state_.epoch_tokens[of_epoch] += n_tokens;
      ++state_.next_step;
      if (part + 1 == n_parts_) report_epoch(epoch);
      save_if_due();
    }
    return {.n_steps = n_steps_, .kl_first = kl_of(0), .kl_last = kl_of(tuning_.epochs - 1)};
  }

  /// Collective.
  void write(const fs::path& run) const {
    const trace::Span span("write the tuned model");
    const ModelOutput output(session_, run, "model");
    session_.world().agree_on([&] {
      if (session_.world().rank() == 0) output.start();
    });
    session_.world().agree_on([&] {
      if (session_.world().rank() == 0) (void)output.write_outside_blocks();
      for (const auto& [block, tuners] : tuners_) {
        if (!writes(block)) continue;
        std::map<model::Projection, quant::QuantizedMatrix> matrices;
        for (const auto& [projection, tuner] : tuners)
          matrices.emplace(projection, moved(tuner.matrix(), c10::Device(c10::kCPU)));
        (void)output.write_block(block, matrices);
      }
    });
    const OutputModules modules = output_modules(session_);
    output.finish(modules.grids, modules.ignored);
  }

 private:
  static constexpr const char* kStage = "tune";

  /// The newest generation, which vouches for every file of the untuned model.
  std::optional<checkpoint::Generation> open_saved() {
    std::optional<checkpoint::Generation> saved = generations_.open_latest(untuned_);
    session_.world().agree(
        saved ? ""
              : fmt::format("no generation in {} vouches for the codes in {}; remove that directory and "
                            "--resume: they are solved again",
                            (untuned_.parent_path() / "checkpoint").string(), untuned_.string()),
        ExitCode::checkpoint);
    state_ = saved->state();
    return saved;
  }

  void restore(const checkpoint::Generation& saved) {
    log::info("resuming the tuning of scales at step {} of {} from generation {}", state_.next_step, n_steps_,
              saved.number());
    for (auto& [block, tuners] : tuners_)
      for (auto& [projection, tuner] : tuners) {
        tuner.restore(saved.read(model::module_name(block, projection)), state_.next_step);
        set_weight(block, projection, tuner);
      }
  }

  /// The replicas of a stage hold the same: they share the blocks out.
  [[nodiscard]] bool writes(int64_t block) const {
    return block % session_.grid->shape().replicas == session_.grid->replica();
  }

  /// Of one saved state, all ranks. Collective.
  [[nodiscard]] double state_bytes() const {
    int64_t n_scales = 0;
    for (const auto& [block, tuners] : tuners_)
      for (const auto& [projection, tuner] : tuners)
        if (writes(block)) n_scales += tuner.matrix().scale.numel();
    constexpr double kBytesOfScale = 12;
    return kBytesOfScale * static_cast<double>(session_.world().all_reduce(n_scales, comm::Reduce::sum));
  }

  [[nodiscard]] double kl_of(int64_t epoch) const {
    const auto index = static_cast<size_t>(epoch);
    return state_.epoch_kl[index] / std::max(1.0, state_.epoch_tokens[index]);
  }

  void report_epoch(int64_t epoch) {
    log::info("scales tuned, epoch {} of {}: KL {:.4f} on the calibration tokens, {:.1f} s", epoch + 1,
              tuning_.epochs, kl_of(epoch), since_epoch_.seconds());
    events_.write(
        "tuned", {{"epoch", epoch + 1}, {"kl_per_token", kl_of(epoch)}, {"seconds", since_epoch_.seconds()}});
    since_epoch_.restart();
  }

  void save_if_due() {
    if (state_.next_step == n_steps_) return;  // the model is written next
    const bool stop = session_.world().any(stop_requested());
    // The first rank's clock decides for all.
    const bool is_due = session_.world().any(session_.world().rank() == 0 &&
                                             pace_.is_due(state_.next_step, since_saved_.seconds()));
    if (!stop && !is_due) return;
    const Timer timer;
    const trace::Span span("checkpoint", state_.next_step);
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    for (const auto& [block, tuners] : tuners_)
      for (const auto& [projection, tuner] : tuners)
        if (writes(block)) tensors.emplace_back(model::module_name(block, projection), tuner.state());
    generations_.commit(state_, tensors, untuned_, {});
    pace_.saved(timer.seconds());
    since_saved_.restart();
    events_.write("checkpoint", {{"next_step", state_.next_step}, {"seconds", timer.seconds()}});
    if (stop)
      fail<StopRequested>("stopped on request after step {} of {} of the tuning; `--resume` continues there",
                          state_.next_step, n_steps_);
  }

  /// The original's weights go before the quantized ones come.
  static std::map<int64_t, at::Tensor> outputs_of(const Session& session, const CalibrationSet& calibration,
                                                  model::WeightStore original) {
    return forward_original(session, calibration, original, calibration.shards.microbatches());
  }

  void read_matrices() {
    const formats::compressed_tensors::SchemeTable schemes(untuned_);
    const io::ShardedReader tensors(untuned_);
    const Range mine = session_.my_blocks();
    for (int64_t block = mine.begin; block < mine.end; ++block)
      for (int p = 0; p < model::kProjections; ++p) {
        const auto projection = static_cast<model::Projection>(p);
        if (const auto matrix = schemes.read(tensors, model::module_name(block, projection)))
          tuners_[block].emplace(projection, quant::ScaleTuner(moved(*matrix, session_.device)));
      }
    for (int64_t block = mine.begin; block < mine.end; ++block) tuners_[block];
  }

  /// The next step, on a part of the tokens: KL summed over them, and their number.
  std::pair<double, double> step(int64_t part) {
    const trace::Span span("tune scales", state_.next_step);
    const double rate =
        tuning_.rate * (1 - static_cast<double>(state_.next_step) / static_cast<double>(n_steps_));
    const std::vector<int64_t> shards = shards_of_part(part, n_parts_, n_shards_);
    std::vector<data::Microbatch> microbatches;
    for (const data::Microbatch& microbatch : calibration_.shards.microbatches())
      if (microbatch.shard % n_parts_ == part) microbatches.push_back(microbatch);

    MeasurePass pass{.title = fmt::format("tune, epoch {}", state_.next_step / n_parts_ + 1),
                     .loss = "kl",
                     .directory = {}};
    pass.original = [this](const data::Microbatch& microbatch) { return outputs_.at(microbatch.index); };
    std::map<int64_t, std::map<model::Projection, at::Tensor>> gradients;
    const auto observation = Observation::of<ScaleGradients>(
        [&](int64_t block, const model::BlockWeights&) {
          return std::make_unique<ScaleGradients>(session_, calibration_, tuners_.at(block), shards);
        },
        [&](int64_t block, ScaleGradients& observer) {
          for (const auto& [projection, tuner] : tuners_.at(block))
            gradients[block][projection] = observer.reduce(projection);
        });
    at::Tensor losses = visit_probe(session_, calibration_, weights_, pass, microbatches, observation);
    share_disjoint(losses, session_.world());
    const at::Tensor totals = losses.sum(0);
    const auto n_tokens = totals[1].item<double>();
    session_.world().agree_on([&] { update(gradients, rate, std::max(1.0, n_tokens)); });
    return {totals[2].item<double>(), n_tokens};
  }

  void update(const std::map<int64_t, std::map<model::Projection, at::Tensor>>& gradients, double rate,
              double n_tokens) {
    const trace::Span span("change scales");
    for (const auto& [block, of_block] : gradients)
      for (const auto& [projection, gradient] : of_block) {
        quant::ScaleTuner& tuner = tuners_.at(block).at(projection);
        tuner.step(gradient.to(session_.device) / n_tokens, rate * quant::share_of_rate(tuner.matrix().spec));
        set_weight(block, projection, tuner);
      }
  }

  void set_weight(int64_t block, model::Projection projection, const quant::ScaleTuner& tuner) {
    weights_.replace(block, projection, quant::dequantize(tuner.matrix()).to(session_.dtype));
  }

  const Session& session_;
  const CalibrationSet& calibration_;
  const config::Tuning& tuning_;
  int64_t n_shards_, n_parts_, n_steps_;
  report::EventLog& events_;
  fs::path untuned_;
  checkpoint::GenerationStore generations_;
  checkpoint::RunState state_;
  std::optional<checkpoint::Generation> saved_;  ///< until it was read
  std::map<int64_t, at::Tensor>
      outputs_;                 ///< of the original model, of this replica's microbatches; last stage
  model::WeightStore weights_;  ///< quantized, with the scales as they are now
  std::map<int64_t, BlockTuners> tuners_;  ///< of this stage's blocks
  CheckpointPace pace_{0, 0};
  Timer since_saved_, since_epoch_;
};

}  // namespace

TuneResult tune_scales(const Session& session, const CalibrationSet& calibration, model::WeightStore original,
                       const fs::path& untuned, const fs::path& run,
                       const checkpoint::Fingerprint& fingerprint, report::EventLog& events) {
  const at::NoGradGuard no_grad;
  const Timer timer;
  TunePass pass(session, calibration, std::move(original), untuned, run, fingerprint, events);
  TuneResult result = pass.run();
  pass.write(run);
  result.wall_s = timer.seconds();
  return result;
}

}  // namespace isobath::pipeline
