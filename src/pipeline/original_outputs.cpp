#include <isobath/pipeline/original_outputs.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/link.hpp>
#include <isobath/report/progress.hpp>

#include "sweep.hpp"

namespace isobath::pipeline {
namespace {

// All microbatches through one block after the other.
std::vector<at::Tensor> sweep_original(const Session& session, const CalibrationSet& calibration,
                                       const model::WeightStore& weights, const model::Rotary& rotary,
                                       const std::vector<data::Microbatch>& mine) {
  std::vector<at::Tensor> states;
  session.world().agree_on([&] {
    if (session.grid->stage() != 0) return;
    const at::Tensor embedding = weights.embedding();
    for (const data::Microbatch& microbatch : mine)
      states.push_back(
          model::embed(embedding, calibration.tokens_of(microbatch.sequences).to(session.device)));
  });
  Sweep pass{.title = "forward pass of the original model", .blocks = {0, session.model().n_blocks}};
  for (const data::Microbatch& microbatch : mine)
    pass.shapes.push_back(
        {microbatch.sequences.size(), calibration.tokens.length(), session.model().d_model});
  pass.step = [&](int64_t, const model::BlockWeights& block_weights, int64_t, const at::Tensor& hidden) {
    return model::block_forward(session.model(), rotary, block_weights, hidden);
  };
  return sweep(session, weights, pass, std::move(states));
}

}  // namespace

std::map<int64_t, at::Tensor> forward_original(const Session& session, const CalibrationSet& calibration,
                                               const model::WeightStore& weights,
                                               const std::vector<data::Microbatch>& microbatches) {
  const at::NoGradGuard no_grad;
  const comm::Communicator& world = session.world();
  const int stage = session.grid->stage();
  comm::Watchdog::set_activity("forward pass of the original model");
  const model::Rotary rotary =
      model::Rotary::make(session.model(), calibration.tokens.length(), session.device);
  const auto options = at::TensorOptions().dtype(session.dtype).device(session.device);
  Link link(session.grid->pipeline(), session.device, stage - 1, session.is_last_stage() ? -1 : stage + 1);
  std::map<int64_t, at::Tensor> outputs;
  const auto expect = [&](const data::Microbatch& microbatch) {
    link.expect({microbatch.sequences.size(), calibration.tokens.length(), session.model().d_model}, options);
  };
  const std::vector<data::Microbatch> mine =
      calibration.shards.held_among(microbatches, session.grid->replica(), session.grid->shape().replicas);
  if (weights.is_streamed()) {
    const std::vector<at::Tensor> states = sweep_original(session, calibration, weights, rotary, mine);
    for (size_t i = 0; i < states.size(); ++i) outputs.emplace(mine[i].index, states[i]);
    return outputs;
  }
  const at::Tensor embedding = stage == 0 ? weights.embedding() : at::Tensor();
  report::Progress progress("original", std::ssize(mine), "microbatches", 0, world.rank() == 0);
  if (stage > 0 && !mine.empty()) expect(mine[0]);
  for (size_t i = 0; i < mine.size(); ++i) {
    const trace::Span span("forward of the original", mine[i].index);
    at::Tensor hidden =
        stage > 0 ? link.take()
                  : model::embed(embedding, calibration.tokens_of(mine[i].sequences).to(session.device));
    for (int64_t block = session.my_blocks().begin; block < session.my_blocks().end; ++block)
      hidden = model::block_forward(session.model(), rotary, weights.block(block), hidden);
    if (session.is_last_stage())
      outputs.emplace(mine[i].index, hidden);
    else
      link.send(hidden);
    if (stage > 0 && i + 1 < mine.size()) expect(mine[i + 1]);
    progress.advance();
  }
  link.flush();
  if (world.any(stop_requested()))
    fail<StopRequested>(
        "stopped on request during the forward pass of the original model; --resume repeats it");
  return outputs;
}

}  // namespace isobath::pipeline
