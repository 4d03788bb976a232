#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/core/trace.hpp>
#include <isobath/report/progress.hpp>

#include "kept_states.hpp"
#include "measure_steps.hpp"
#include "sweep.hpp"

namespace isobath::pipeline {

void sweep_back(const Session& session, const CalibrationSet& calibration, const model::WeightStore& weights,
                const MeasurePass& pass, const std::vector<data::Microbatch>& mine,
                const Observation& observation, at::Tensor& losses) {
  const at::NoGradGuard no_grad;
  const comm::Communicator& world = session.world();
  const MeasureSteps steps(session, calibration, pass);
  const int64_t n_blocks = session.model().n_blocks;
  const bool enters = session.grid->stage() == session.stage_of(pass.first_block);
  const int64_t n_ways = pass.is_forward_only ? 1 : 2;
  report::Progress progress(pass.title, n_ways * (n_blocks - pass.first_block),
                            pass.is_forward_only ? "blocks" : "blocks (forward, backward)", 0,
                            world.rank() == 0);

  // X of every block, all microbatches.                                                  kept for the way
  // back
  KeptStates inputs(session);
  Sweep forward{.title = pass.title, .blocks = {pass.first_block, n_blocks}};
  Sweep backward{.title = pass.title, .blocks = forward.blocks, .is_backward = true};
  for (const data::Microbatch& microbatch : mine) {
    std::vector<int64_t> shape{microbatch.sequences.size(), calibration.tokens.length(),
                               session.model().d_model};
    forward.shapes.push_back(shape);
    shape.insert(shape.begin(), steps.loss().n_samples);
    backward.shapes.push_back(std::move(shape));
  }
  std::vector<at::Tensor> states;
  at::Tensor embedding;
  world.agree_on([&] {
    if (enters && !pass.source) embedding = weights.embedding();
  });
  if (enters)
    for (const data::Microbatch& microbatch : mine) states.push_back(steps.enter(embedding, microbatch));
  embedding.reset();
  forward.step = [&](int64_t block, const model::BlockWeights& block_weights, int64_t item,
                     const at::Tensor& state) {
    if (!pass.is_forward_only) inputs.keep(block, item, state);
    return steps.forward(block_weights, state);
  };
  forward.end_block = [&](int64_t) { progress.advance(); };
  states = sweep(session, weights, forward, std::move(states));

  // ∂L/∂output of the last block.                                                        last stage
  if (session.is_last_stage()) weights.prefetch(n_blocks - 1);
  model::HeadWeights head;
  world.agree_on([&] {
    if (session.is_last_stage()) head = weights.head();
  });
  for (size_t i = 0; i < states.size(); ++i)
    states[i] = steps.loss_gradient(head, states[i], mine[i], losses);
  head = {};
  if (pass.is_forward_only) return;

  // Back through the blocks; each one's statistics are whole when it is left.            one block at a time
  std::unique_ptr<BlockObserver> observer;
  backward.begin_block = [&](int64_t block, const model::BlockWeights& block_weights) {
    observer = observation.make(block, block_weights);
  };
  backward.step = [&](int64_t block, const model::BlockWeights& block_weights, int64_t item,
                      const at::Tensor& gradient) {
    const auto i = static_cast<size_t>(item);
    auto activations = model::BlockActivations::of_input(inputs.take(block, item));
    return steps.backward(block_weights, activations, gradient, mine[i], closes_shard(mine, i), *observer);
  };
  backward.end_block = [&](int64_t block) {
    inputs.forget(block);
    observation.take(block, *observer);
    observer.reset();
    progress.advance();
  };
  (void)sweep(session, weights, backward, std::move(states));
}

void measure_streamed(const Session& session, const CalibrationSet& calibration,
                      const model::WeightStore& weights, const MeasurePass& pass, at::Tensor& losses) {
  const StatisticsHeader header = statistics_header(session, calibration, pass.loss);
  const std::vector<data::Microbatch> mine =
      calibration.shards.microbatches_of(session.grid->replica(), session.grid->shape().replicas);
  const auto observation = Observation::of<StatisticsObserver>(
      [&](int64_t block, const model::BlockWeights& of_block) {
        return make_statistics_observer(session, calibration, pass, block, of_block);
      },
      [&](int64_t block, StatisticsObserver& observer) {
        const trace::Span span("reduce and write statistics", block);
        const BlockStatistics statistics = observer.reduce();
        if (session.grid->replica() == root_of_block(session, block))
          write_statistics(pass.directory, block, header, statistics);
      });
  sweep_back(session, calibration, weights, pass, mine, observation, losses);
}

}  // namespace isobath::pipeline
