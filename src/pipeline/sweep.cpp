#include "sweep.hpp"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/pipeline/link.hpp>

namespace isobath::pipeline {
namespace {

// All states of one stage go to the stage that works next.
std::vector<at::Tensor> hand_over(const Session& session, const Sweep& pass, int source, int destination,
                                  std::vector<at::Tensor> states) {
  const trace::Span span("states to the next stage");
  const int stage = session.grid->stage();
  Link link(session.grid->pipeline(), session.device, stage == destination ? source : -1,
            stage == source ? destination : -1);
  std::vector<at::Tensor> arrived;
  if (stage == source)
    for (at::Tensor& state : states) link.send(std::move(state));
  if (stage == destination)
    for (const std::vector<int64_t>& shape : pass.shapes) {
      link.expect(shape, at::TensorOptions().dtype(session.dtype).device(session.device));
      arrived.push_back(link.take());
    }
  link.flush();
  return arrived;
}

}  // namespace

std::vector<at::Tensor> sweep(const Session& session, const model::WeightStore& weights, const Sweep& pass,
                              std::vector<at::Tensor> states) {
  const at::NoGradGuard no_grad;
  const int64_t direction = pass.is_backward ? -1 : 1;
  const int64_t first = pass.is_backward ? pass.blocks.end - 1 : pass.blocks.begin;
  const auto is_mine = [&](int64_t block) {
    return pass.blocks.contains(block) && session.my_blocks().contains(block);
  };
  int working = session.stage_of(first);
  if (session.grid->stage() != working) states.clear();
  for (int64_t block = first; pass.blocks.contains(block); block += direction) {
    comm::Watchdog::set_activity(fmt::format("{}, block {}", pass.title, block));
    if (const int stage = session.stage_of(block); stage != working) {
      states = hand_over(session, pass, working, stage, std::move(states));
      working = stage;
    }
    const int64_t next = block + direction;
    const model::BlockWeights taken =
        take_block(session, weights, block, is_mine(block), is_mine(next) ? next : -1);
    if (is_mine(block)) {
      const trace::Span span(pass.is_backward ? "backward of a block" : "forward of a block", block);
      if (pass.begin_block) pass.begin_block(block, taken);
      for (size_t item = 0; item < states.size(); ++item)
        states[item] = pass.step(block, taken, static_cast<int64_t>(item), states[item]);
    }
    session.world().agree_on([&] {
      if (is_mine(block) && pass.end_block) pass.end_block(block);
    });
    if (session.world().any(stop_requested()))
      fail<StopRequested>(
          "stopped on request during {}, block {}; nothing of this stage is kept, --resume starts it again",
          pass.title, block);
  }
  return states;
}

}  // namespace isobath::pipeline
