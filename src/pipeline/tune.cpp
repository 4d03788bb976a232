#include <isobath/pipeline/tune.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/formats/compressed_tensors.hpp>
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
           const fs::path& untuned, report::EventLog& events)
      : session_(session),
        calibration_(calibration),
        tuning_(session.config.quantization.tuning),
        n_shards_(calibration.shards.n_shards()),
        n_parts_(std::min(tuning_.steps, n_shards_)),
        events_(events),
        outputs_(outputs_of(session, calibration, std::move(original))),
        weights_(open_version(session, untuned)) {
    session.world().agree_on([&] { read_matrices(untuned); });
  }

  TuneResult run() {
    const Timer timer;
    TuneResult result;
    for (int64_t epoch = 0; epoch < tuning_.epochs; ++epoch) {
      const Timer of_epoch;
      double kl = 0, n_tokens = 0;
      for (int64_t part = 0; part < n_parts_; ++part) {
        comm::Watchdog::set_activity(
            fmt::format("tune scales, epoch {}, step {} of {}", epoch + 1, part + 1, n_parts_));
        const auto [of_part, tokens] = step(epoch, part);
        kl += of_part;
        n_tokens += tokens;
        ++result.n_steps;
        if (session_.world().any(stop_requested()))
          fail<StopRequested>(
              "stopped on request while scales are tuned; nothing of that is kept, --resume starts it again");
      }
      const double per_token = kl / std::max(1.0, n_tokens);
      if (epoch == 0) result.kl_first = per_token;
      result.kl_last = per_token;
      log::info("scales tuned, epoch {} of {}: KL {:.4f} on the calibration tokens, {:.1f} s", epoch + 1,
                tuning_.epochs, per_token, of_epoch.seconds());
      events_.write("tuned",
                    {{"epoch", epoch + 1}, {"kl_per_token", per_token}, {"seconds", of_epoch.seconds()}});
    }
    result.wall_s = timer.seconds();
    return result;
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
      // The replicas of a stage hold the same.
      for (const auto& [block, tuners] : tuners_) {
        if (block % session_.grid->shape().replicas != session_.grid->replica()) continue;
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
  /// The original's weights go before the quantized ones come.
  static std::map<int64_t, at::Tensor> outputs_of(const Session& session, const CalibrationSet& calibration,
                                                  model::WeightStore original) {
    return forward_original(session, calibration, original);
  }

  void read_matrices(const fs::path& untuned) {
    const formats::compressed_tensors::SchemeTable schemes(untuned);
    const io::ShardedReader tensors(untuned);
    const Range mine = session_.my_blocks();
    for (int64_t block = mine.begin; block < mine.end; ++block)
      for (int p = 0; p < model::kProjections; ++p) {
        const auto projection = static_cast<model::Projection>(p);
        if (const auto matrix = schemes.read(tensors, model::module_name(block, projection)))
          tuners_[block].emplace(projection, quant::ScaleTuner(moved(*matrix, session_.device)));
      }
    for (int64_t block = mine.begin; block < mine.end; ++block) tuners_[block];
  }

  /// KL summed over the tokens of a part, and their number.
  std::pair<double, double> step(int64_t epoch, int64_t part) {
    const int64_t n = epoch * n_parts_ + part, n_steps = tuning_.epochs * n_parts_;
    const trace::Span span("tune scales", n);
    const double rate = tuning_.rate * (1 - static_cast<double>(n) / static_cast<double>(n_steps));
    const std::vector<int64_t> shards = shards_of_part(part, n_parts_, n_shards_);
    std::vector<data::Microbatch> microbatches;
    for (const data::Microbatch& microbatch : calibration_.shards.microbatches())
      if (microbatch.shard % n_parts_ == part) microbatches.push_back(microbatch);

    MeasurePass pass{.title = fmt::format("tune, epoch {}", epoch + 1), .loss = "kl", .directory = {}};
    pass.original = [this](const data::Microbatch& microbatch) { return outputs_.at(microbatch.index); };
    std::map<int64_t, std::map<model::Projection, at::Tensor>> gradients;
    at::Tensor losses = visit_probe(
        session_, calibration_, weights_, pass, microbatches, {.tuners = &tuners_, .tuned_shards = shards},
        [&](int64_t block, BlockObserver& observer) {
          for (const auto& [projection, tuner] : tuners_.at(block))
            gradients[block][projection] = observer.reduce_scale_gradient(projection);
        });
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
        tuner.step(gradient.to(session_.device) / n_tokens, rate);
        weights_.replace(block, projection, quant::dequantize(tuner.matrix()).to(session_.dtype));
      }
  }

  const Session& session_;
  const CalibrationSet& calibration_;
  const config::Tuning& tuning_;
  int64_t n_shards_, n_parts_;
  report::EventLog& events_;
  std::map<int64_t, at::Tensor>
      outputs_;                 ///< of the original model, of this replica's microbatches; last stage
  model::WeightStore weights_;  ///< quantized, with the scales as they are now
  std::map<int64_t, BlockTuners> tuners_;  ///< of this stage's blocks
};

}  // namespace

TuneResult tune_scales(const Session& session, const CalibrationSet& calibration, model::WeightStore original,
                       const fs::path& untuned, const fs::path& run, report::EventLog& events) {
  const at::NoGradGuard no_grad;
  const Timer timer;
  TunePass pass(session, calibration, std::move(original), untuned, events);
  TuneResult result = pass.run();
  pass.write(run);
  result.wall_s = timer.seconds();
  return result;
}

}  // namespace isobath::pipeline
