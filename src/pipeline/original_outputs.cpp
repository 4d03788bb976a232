#include <isobath/pipeline/original_outputs.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/link.hpp>
#include <isobath/report/progress.hpp>

namespace isobath::pipeline {

std::map<int64_t, at::Tensor> forward_original(const Session& session, const CalibrationSet& calibration,
                                               const StageWeights& weights) {
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
      calibration.shards.microbatches_of(session.grid->replica(), session.grid->shape().replicas);
  report::Progress progress("original", std::ssize(mine), "microbatches", 0, world.rank() == 0);
  if (stage > 0 && !mine.empty()) expect(mine[0]);
  for (size_t i = 0; i < mine.size(); ++i) {
    const trace::Span span("forward of the original", mine[i].index);
    at::Tensor hidden = stage > 0 ? link.take()
                                  : model::embed(weights.embedding,
                                                 calibration.tokens_of(mine[i].sequences).to(session.device));
    for (const auto& [block, block_weights] : weights.blocks)
      hidden = model::block_forward(session.model(), rotary, block_weights, hidden);
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
