#include <isobath/pipeline/reestimation.hpp>

#include <ATen/ATen.h>

#include <isobath/core/log.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/pipeline/drift.hpp>
#include <isobath/pipeline/original_outputs.hpp>
#include <isobath/pipeline/row_grouping.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <nlohmann/json.hpp>

namespace isobath::pipeline {
namespace {

constexpr int kHiddenTags = 16000;  // tags of Communicator are smaller than this

int tag_of(const data::Microbatch& microbatch) {
  return static_cast<int>(microbatch.index % kHiddenTags);
}

void add(nlohmann::json& record, const Drift& drift) {
  record["cosine"] = drift.cosine;
  record["smallest_cosine"] = drift.smallest;
  record["smallest_of"] = drift.module;
}

}  // namespace

std::filesystem::path Reestimation::directory_of(int64_t block) const {
  return run_ / "measure" / fmt::format("before-block-{:05d}", block);
}

std::vector<data::Microbatch> Reestimation::probe() const {
  return probe_microbatches(calibration_.shards, session_.config.quantization.reestimate.probe_sequences);
}

void Reestimation::send_hidden(int64_t block, const std::vector<data::Microbatch>& microbatches,
                               const HiddenStreams& streams) {
  const comm::Communicator& world = session_.world();
  const int entry_stage = session_.stage_of(block), n_replicas = session_.grid->shape().replicas;
  const int64_t n_shards = calibration_.shards.n_shards();
  for (const data::Microbatch& microbatch : microbatches) {
    if (owner_of(microbatch.shard, n_shards, world.size()) != world.rank()) continue;
    const int reader = session_.grid->world_rank(
        entry_stage, static_cast<int>(owner_of(microbatch.shard, n_shards, n_replicas)));
    if (reader == world.rank()) continue;
    at::Tensor hidden = streams.hidden(microbatch.index).cpu();
    auto request = world.send_async(hidden, reader, tag_of(microbatch));
    leaving_.emplace_back(std::move(hidden), std::move(request));
  }
}

void Reestimation::wait_for_sends() {
  for (auto& [tensor, request] : leaving_) request.wait();
  leaving_.clear();
}

MeasurePass Reestimation::pass_from(int64_t block, const std::string& title, const std::string& loss,
                                    const HiddenStreams& streams) {
  const config::Reestimate& reestimate = session_.config.quantization.reestimate;
  MeasurePass pass{.title = title, .first_block = block, .source = {}, .directory = directory_of(block)};
  if (loss != "same") pass.loss = loss;
  pass.source = [this, &streams](const data::Microbatch& microbatch) {
    const comm::Communicator& world = session_.world();
    const int holder =
        static_cast<int>(owner_of(microbatch.shard, calibration_.shards.n_shards(), world.size()));
    if (holder == world.rank()) return streams.hidden(microbatch.index);
    at::Tensor hidden =
        at::empty({microbatch.sequences.size(), calibration_.tokens.length(), session_.model().d_model},
                  session_.dtype);
    world.receive(hidden, holder, tag_of(microbatch));
    return hidden.to(session_.device);
  };
  if (loss == "kl") {
    // Not part of a generation: a resumed job computes the same again.
    const bool needs_all = reestimate.policy != "never" && reestimate.loss == "kl";
    if (!original_)
      original_ = forward_original(session_, calibration_, weights_,
                                   needs_all ? calibration_.shards.microbatches() : probe());
    pass.original = [this](const data::Microbatch& microbatch) { return original_->at(microbatch.index); };
  }
  return pass;
}

MeasurePass Reestimation::measurement_from(int64_t block, const std::string& title,
                                           const HiddenStreams& streams) {
  MeasurePass pass = pass_from(block, title, session_.config.quantization.reestimate.loss, streams);
  // Clusters of rows stay those of the first measurement.
  if (clusters_rows(session_.config.sensitivity))
    session_.world().agree_on([&] {
      const Range mine = session_.my_blocks();
      for (int64_t b = std::max(block, mine.begin); b < mine.end; ++b)
        pass.row_groups[b] = row_groups_in(session_, statistics_, b);
    });
  return pass;
}

std::optional<PassLoss> Reestimation::loss_before(int64_t block, const HiddenStreams& streams) {
  if (!session_.config.quantization.reestimate.track) return {};
  const std::vector<data::Microbatch> microbatches = probe();
  MeasurePass pass = pass_from(block, fmt::format("divergence before block {}", block), "kl", streams);
  pass.is_forward_only = true;
  send_hidden(block, microbatches, streams);
  const PassLoss loss = measure_loss(session_, calibration_, weights_, pass, microbatches);
  wait_for_sends();
  return loss;
}

void Reestimation::before_block(int64_t block, const HiddenStreams& streams, checkpoint::RunState& state) {
  const config::Reestimate& reestimate = session_.config.quantization.reestimate;
  if (reestimate.policy == "never" || block == 0 || block % reestimate.blocks != 0 ||
      state.sensitivity_from_block >= block)
    return;
  nlohmann::json record = {{"block", block}};
  bool refreshes = true;
  if (reestimate.policy == "drift") {
    const Timer timer;
    const std::vector<data::Microbatch> microbatches = probe();
    const MeasurePass pass = measurement_from(block, fmt::format("drift before block {}", block), streams);
    send_hidden(block, microbatches, streams);
    const auto now = measure_token_weights(session_, calibration_, weights_, pass, microbatches);
    wait_for_sends();
    const Drift drift = measure_drift(
        session_, block,
        [&](int64_t b) {
          auto in_use = read_token_weights(statistics(state), b);
          for (at::Tensor& of_linear : in_use) {
            std::vector<at::Tensor> rows;
            for (const data::Microbatch& microbatch : microbatches)
              rows.push_back(of_linear.slice(0, microbatch.sequences.begin, microbatch.sequences.end));
            of_linear = at::cat(rows);
          }
          return in_use;
        },
        [&](int64_t b) { return now.at(b); });
    refreshes = drift.cosine < reestimate.threshold;
    add(record, drift);
    record["threshold"] = reestimate.threshold;
    record["seconds_of_check"] = timer.seconds();
    log::info("before block {}: cosine of token weights with those in use {:.4f} (smallest {:.4f}, {}), {}",
              block, drift.cosine, drift.smallest, drift.module,
              refreshes ? "measured again" : "they are kept");
  }
  record["refreshed"] = refreshes;
  if (refreshes) {
    const MeasurePass pass =
        measurement_from(block, fmt::format("re-estimate before block {}", block), streams);
    send_hidden(block, calibration_.shards.microbatches(), streams);
    const MeasureResult result = measure(session_, calibration_, weights_, pass, events_);
    wait_for_sends();
    // What the new measurement changes, where drift has not said so already.
    if (!record.contains("cosine")) {
      const std::filesystem::path before = statistics(state);
      add(record, measure_drift(
                      session_, block, [&](int64_t b) { return read_token_weights(before, b); },
                      [&](int64_t b) { return read_token_weights(directory_of(block), b); }));
    }
    state.sensitivity_from_block = block;
    record["seconds_of_refresh"] = result.wall_s;
    record["nll_per_token"] = result.loss.nll_per_token;
    if (result.loss.kl_per_token) record["kl_per_token"] = *result.loss.kl_per_token;
  }
  events_.write("reestimation", record);
  state.reestimations.push_back(record.dump());
}

}  // namespace isobath::pipeline
