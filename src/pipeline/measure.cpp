#include <isobath/pipeline/measure.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/io/files.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/pipeline/link.hpp>
#include <isobath/pipeline/schedule.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/report/progress.hpp>
#include <nlohmann/json.hpp>

#include "measure_steps.hpp"

namespace isobath::pipeline {
namespace {

/// The blocks of one stage, driven by the steps of the schedule.
class Stage {
 public:
  Stage(const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
        const MeasurePass& pass, const Observation& observation)
      : session_(session),
        calibration_(calibration),
        weights_(weights),
        steps_(session, calibration, pass),
        is_forward_only_(pass.is_forward_only),
        entry_stage_(session.stage_of(pass.first_block)),
        blocks_{std::max(session.my_blocks().begin, pass.first_block), session.my_blocks().end},
        forward_(session.grid->pipeline(), session.device, is_entry() ? -1 : session.grid->stage() - 1,
                 session.is_last_stage() ? -1 : session.grid->stage() + 1),
        backward_(session.grid->pipeline(), session.device,
                  session.is_last_stage() ? -1 : session.grid->stage() + 1,
                  is_entry() ? -1 : session.grid->stage() - 1) {
    if (!takes_part()) return;
    for (int64_t block = blocks_.begin; block < blocks_.end && !is_forward_only_; ++block) {
      const model::BlockWeights of_block = weights.block(block);
      observers_.push_back(observation.make(block, of_block));
    }
    if (is_entry() && !pass.source) embedding_ = weights.embedding();
    if (session.is_last_stage()) head_ = weights.head();
  }

  [[nodiscard]] bool takes_part() const { return session_.grid->stage() >= entry_stage_; }
  [[nodiscard]] bool is_entry() const { return session_.grid->stage() == entry_stage_; }
  [[nodiscard]] Range blocks() const { return blocks_; }

  /// When all segments are done.
  void hand_over(const Observation& observation) {
    for (size_t i = 0; i < observers_.size(); ++i)
      observation.take(blocks_.begin + static_cast<int64_t>(i), *observers_[i]);
  }

  /// Runs one segment of this replica's microbatches; losses [n, 3] receives each microbatch's nll, predicted
  /// tokens and KL by its global index (last stage).
  void run(std::span<const data::Microbatch> microbatches, at::Tensor& losses, report::Progress& progress) {
    if (!takes_part() || microbatches.empty()) return;
    const auto n = static_cast<int64_t>(microbatches.size());
    const int n_stages = session_.grid->shape().stages - entry_stage_,
              position = session_.grid->stage() - entry_stage_;
    if (!is_entry()) expect_hidden(microbatches[0]);
    const bool awaits_gradients = !session_.is_last_stage() && !is_forward_only_;
    if (awaits_gradients) expect_gradient(microbatches[0]);
    for (const Step& step : one_forward_one_backward(n, position, n_stages)) {
      const data::Microbatch& microbatch = microbatches[static_cast<size_t>(step.microbatch)];
      const bool has_next = step.microbatch + 1 < n;
      if (step.kind == Step::Kind::forward) {
        const trace::Span span("forward", microbatch.index);
        forward(microbatch);
        if (has_next && !is_entry()) expect_hidden(microbatches[static_cast<size_t>(step.microbatch + 1)]);
      } else {
        const trace::Span span("backward", microbatch.index);
        backward(microbatch, closes_shard(microbatches, static_cast<size_t>(step.microbatch)), losses);
        if (has_next && awaits_gradients)
          expect_gradient(microbatches[static_cast<size_t>(step.microbatch + 1)]);
        progress.advance();
      }
    }
    forward_.flush();
    backward_.flush();
  }

 private:
  [[nodiscard]] at::TensorOptions options() const {
    return at::TensorOptions().dtype(session_.dtype).device(session_.device);
  }
  [[nodiscard]] std::vector<int64_t> hidden_shape(const data::Microbatch& microbatch) const {
    return {microbatch.sequences.size(), calibration_.tokens.length(), session_.model().d_model};
  }
  void expect_hidden(const data::Microbatch& microbatch) {
    forward_.expect(hidden_shape(microbatch), options());
  }
  void expect_gradient(const data::Microbatch& microbatch) {
    std::vector<int64_t> shape = hidden_shape(microbatch);
    shape.insert(shape.begin(), steps_.loss().n_samples);
    backward_.expect(shape, options());
  }

  static at::Tensor arrived(Link& link) {
    const trace::Span span("wait for a neighbour");
    return link.take();
  }

  void forward(const data::Microbatch& microbatch) {
    const at::NoGradGuard no_grad;
    at::Tensor hidden = is_entry() ? steps_.enter(embedding_, microbatch) : arrived(forward_);
    InFlight& kept = in_flight_[microbatch.index];
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      model::BlockActivations& activations = kept.blocks.emplace_back();
      const at::Tensor input = hidden;
      hidden = steps_.forward(weights_.block(block), input, &activations);
      // The last blocks, whose backward passes come first, keep their activations; the others only their
      // input.
      if (block < blocks_.end - n_kept_blocks_) activations = model::BlockActivations::of_input(input);
    }
    if (session_.is_last_stage())
      kept.output = hidden;
    else
      forward_.send(hidden);
  }

  void backward(const data::Microbatch& microbatch, bool is_last_of_shard, at::Tensor& losses) {
    InFlight kept = std::move(in_flight_.at(microbatch.index));
    in_flight_.erase(microbatch.index);
    at::Tensor gradient;
    if (session_.is_last_stage())
      gradient = steps_.loss_gradient(head_, kept.output, microbatch, losses);
    else if (!is_forward_only_)
      gradient = arrived(backward_);
    if (is_forward_only_) return;
    for (int64_t block = blocks_.end - 1; block >= blocks_.begin; --block) {
      gradient = steps_.backward(weights_.block(block), kept.blocks.back(), gradient, microbatch,
                                 is_last_of_shard, *observers_[static_cast<size_t>(block - blocks_.begin)]);
      kept.blocks.pop_back();
    }
    if (!is_entry()) backward_.send(gradient);
  }

  /// Blocks of this stage whose activations fit the memory set aside for all microbatches in flight.
  [[nodiscard]] int64_t count_kept_blocks() const {
    if (is_forward_only_) return 0;
    const int64_t in_flight = session_.grid->shape().stages - session_.grid->stage();
    return model::count_kept_blocks(session_.model(), kept_activations(session_.config, session_.dtype),
                                    in_flight);
  }

  const Session& session_;
  const CalibrationSet& calibration_;
  const model::WeightStore& weights_;
  at::Tensor embedding_;     // on the entry stage without a source
  model::HeadWeights head_;  // on the last stage
  MeasureSteps steps_;
  bool is_forward_only_;
  int entry_stage_;
  Range blocks_;
  Link forward_, backward_;
  std::vector<std::unique_ptr<BlockObserver>> observers_;
  /// A microbatch between its forward and its backward pass.
  struct InFlight {
    std::vector<model::BlockActivations> blocks;
    at::Tensor output;  // of the last block, on the last stage
  };
  std::map<int64_t, InFlight> in_flight_;
  int64_t n_kept_blocks_ = count_kept_blocks();
};

// One forward, one backward, with resident weights; losses as in measure_streamed.
void measure_pipelined(const Session& session, const CalibrationSet& calibration,
                       const model::WeightStore& weights, const MeasurePass& pass, at::Tensor& losses) {
  const comm::Communicator& world = session.world();
  const comm::GridShape shape = session.grid->shape();

  // D and the reduced statistics of as many blocks as there are replicas meet on one of these each; then all
  // replicas write their block's file at once.
  const StatisticsHeader header = statistics_header(session, calibration, pass.loss);
  std::string failure;
  ExitCode code = ExitCode::io;
  std::optional<std::pair<int64_t, BlockStatistics>> to_write;
  const auto observation = Observation::of<StatisticsObserver>(
      [&](int64_t block, const model::BlockWeights& of_block) {
        return make_statistics_observer(session, calibration, pass, block, of_block);
      },
      [&](int64_t block, StatisticsObserver& observer) {
        const trace::Span span("reduce and write statistics", block);
        BlockStatistics statistics = observer.reduce();
        if (session.grid->replica() == root_of_block(session, block))
          to_write.emplace(block, std::move(statistics));
        const bool writes_now = (block + 1) % shape.replicas == 0 || block + 1 == session.my_blocks().end;
        if (!writes_now || !to_write) return;
        const auto [number, of_block] = *std::exchange(to_write, std::nullopt);
        if (!failure.empty()) return;
        try {
          write_statistics(pass.directory, number, header, of_block);
        } catch (const Error& error) {
          failure = error.what();
          code = error.code();
        }
      });

  // Each replica takes its logical shards, a segment at a time; a segment is whole shards.
  Stage stage(session, calibration, weights, pass, observation);
  const data::ShardPlan& shards = calibration.shards;
  const std::vector<data::Microbatch> mine = shards.microbatches_of(session.grid->replica(), shape.replicas);
  const auto n_microbatches = static_cast<int64_t>(shards.microbatches().size());
  const int64_t per_segment = model::shards_per_segment(n_microbatches, shards.n_shards(), shape.stages);
  const int64_t n_segments = (shards.shards_of(0, shape.replicas).size() + per_segment - 1) / per_segment;

  {
    report::Progress progress(
        pass.title, static_cast<int64_t>(mine.size()), "microbatches",
        session.config.calibration.microbatch * calibration.tokens.length() * shape.replicas,
        world.rank() == session.grid->world_rank(session.stage_of(pass.first_block), 0));
    const Range my_shards = shards.shards_of(session.grid->replica(), shape.replicas);
    for (int64_t segment = 0; segment < n_segments; ++segment) {
      const Range now{my_shards.begin + segment * per_segment,
                      std::min(my_shards.end, my_shards.begin + (segment + 1) * per_segment)};
      const auto begin =
          std::find_if(mine.begin(), mine.end(), [&](const auto& m) { return m.shard >= now.begin; });
      const auto end =
          std::find_if(mine.begin(), mine.end(), [&](const auto& m) { return m.shard >= now.end; });
      stage.run({begin, std::max(begin, end)}, losses, progress);
      progress.note(fmt::format("{}: segment {}/{}", pass.title, segment + 1, n_segments));
      if (world.any(stop_requested()))
        fail<StopRequested>(
            "stopped on request during {}; nothing of this stage is kept, --resume measures again",
            pass.title);
    }
  }

  stage.hand_over(observation);
  world.agree(failure, code);
}

// losses [microbatches, 3]: nll, predicted tokens and KL, each where it was computed. Collective.
PassLoss loss_of_all(at::Tensor losses, const MeasurePass& pass, const comm::Communicator& world) {
  share_disjoint(losses, world);
  double nll = 0, n = 0, kl = 0;
  for (int64_t i = 0; i < losses.size(0); ++i) {
    nll += losses[i][0].item<double>();
    n += losses[i][1].item<double>();
    kl += losses[i][2].item<double>();
  }
  PassLoss loss{.nll_per_token = nll / std::max(1.0, n), .n_tokens = static_cast<int64_t>(n)};
  if (pass.original) loss.kl_per_token = kl / std::max(1.0, n);
  return loss;
}

}  // namespace

// "2", "2 by head", "2 by cluster, of 8 sequences".
static std::string row_groups_text(const config::Sensitivity& sensitivity) {
  std::string text = std::to_string(sensitivity.row_groups);
  if (clusters_rows(sensitivity))
    text += fmt::format(" by cluster, of {} sequences", sensitivity.grouping_sequences);
  else if (sensitivity.row_groups > 1 && sensitivity.grouping == "head")
    text += " by head";
  return text;
}

StatisticsHeader statistics_header(const Session& session, const CalibrationSet& calibration,
                                   const std::string& loss_of_pass) {
  const config::Sensitivity& sensitivity = session.config.sensitivity;
  const std::string& loss = loss_of_pass.empty() ? sensitivity.loss : loss_of_pass;
  return {{"format", "isobath statistics 1"},
          {"model", session.source->tensors().fingerprint()},
          {"tokens", calibration.tokens.digest},
          {"n_sequences", std::to_string(calibration.tokens.n_sequences())},
          {"length", std::to_string(calibration.tokens.length())},
          {"microbatch", std::to_string(session.config.calibration.microbatch)},
          {"logical_shards", std::to_string(calibration.shards.n_shards())},
          {"seed", std::to_string(session.config.calibration.seed)},
          {"loss", loss},
          {"samples", std::to_string(loss == "fisher" ? sensitivity.samples : 1)},
          {"row_groups", row_groups_text(sensitivity)},
          {"per_sequence", sensitivity.per_sequence},
          {"probes", std::to_string(sensitivity.per_sequence == "probes" ? sensitivity.probes : 0)},
          {"compute_dtype", c10::toString(session.dtype)}};
}

MeasureResult measure(const Session& session, const CalibrationSet& calibration,
                      const model::WeightStore& weights, const MeasurePass& pass, report::EventLog& events) {
  const Timer timer;
  const comm::Communicator& world = session.world();
  comm::Watchdog::set_activity(pass.title);
  world.agree_on([&] {
    if (world.rank() == 0) io::make_directories(pass.directory);
  });
  const auto n_microbatches = static_cast<int64_t>(calibration.shards.microbatches().size());
  at::Tensor losses = at::zeros({n_microbatches, 3}, at::kDouble);  // nll, tokens and KL of each
  if (weights.is_streamed())
    measure_streamed(session, calibration, weights, pass, losses);
  else
    measure_pipelined(session, calibration, weights, pass, losses);

  MeasureResult result{.loss = loss_of_all(losses, pass, world), .wall_s = timer.seconds()};
  nlohmann::json event = {{"title", pass.title},
                          {"first_block", pass.first_block},
                          {"loss", pass.loss.empty() ? session.config.sensitivity.loss : pass.loss},
                          {"seconds", result.wall_s},
                          {"tokens", result.loss.n_tokens},
                          {"nll_per_token", result.loss.nll_per_token}};
  if (result.loss.kl_per_token) event["kl_per_token"] = *result.loss.kl_per_token;
  events.write("measured", event);
  return result;
}

at::Tensor visit_probe(const Session& session, const CalibrationSet& calibration,
                       const model::WeightStore& weights, const MeasurePass& pass,
                       const std::vector<data::Microbatch>& probe, const Observation& observation) {
  comm::Watchdog::set_activity(pass.title);
  const std::vector<data::Microbatch> mine =
      calibration.shards.held_among(probe, session.grid->replica(), session.grid->shape().replicas);
  at::Tensor losses = at::zeros({std::ssize(calibration.shards.microbatches()), 3}, at::kDouble);
  if (weights.is_streamed()) {
    sweep_back(session, calibration, weights, pass, mine, observation, losses);
    return losses;
  }
  Stage stage(session, calibration, weights, pass, observation);
  {
    report::Progress progress(
        pass.title, std::ssize(mine), "microbatches", 0,
        session.world().rank() == session.grid->world_rank(session.stage_of(pass.first_block), 0));
    stage.run(mine, losses, progress);
  }
  stage.hand_over(observation);
  return losses;
}

PassLoss measure_loss(const Session& session, const CalibrationSet& calibration,
                      const model::WeightStore& weights, const MeasurePass& pass,
                      const std::vector<data::Microbatch>& probe) {
  return loss_of_all(visit_probe(session, calibration, weights, pass, probe, {}), pass, session.world());
}

std::map<int64_t, std::array<at::Tensor, model::kProjections>> measure_token_weights(
    const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
    const MeasurePass& pass, const std::vector<data::Microbatch>& probe) {
  const Range local =
      calibration.shards.sequences_of(session.grid->replica(), session.grid->shape().replicas);
  int64_t n_sequences = 0;
  for (const data::Microbatch& microbatch : probe) n_sequences += microbatch.sequences.size();

  std::map<int64_t, std::array<at::Tensor, model::kProjections>> found;
  const auto observation = Observation::of<TokenWeightsObserver>(
      [&](int64_t block, const model::BlockWeights&) {
        return std::make_unique<TokenWeightsObserver>(
            session, calibration, row_groups_of(session, pass, block), loss_of(session, pass).n_samples);
      },
      [&](int64_t block, TokenWeightsObserver& observer) {
        auto& modules = found[block];
        for (int p = 0; p < model::kProjections; ++p) {
          const at::Tensor& observed = observer.value(static_cast<model::Projection>(p));
          at::Tensor& all = modules[static_cast<size_t>(p)];
          all = at::zeros({n_sequences, observed.size(1), observed.size(2)}, at::kFloat);
          int64_t row = 0;
          for (const data::Microbatch& microbatch : probe) {
            const int64_t n = microbatch.sequences.size();
            if (local.contains(microbatch.sequences.begin))
              all.slice(0, row, row + n)
                  .copy_(observed.slice(0, microbatch.sequences.begin - local.begin,
                                        microbatch.sequences.end - local.begin));
            row += n;
          }
          share_disjoint(all, session.grid->replicas());
        }
      });
  (void)visit_probe(session, calibration, weights, pass, probe, observation);
  return found;
}

}  // namespace isobath::pipeline
