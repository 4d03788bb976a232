#include "model/gradient_probe.hpp"

#include <ATen/ATen.h>

#include <isobath/model/block.hpp>
#include <isobath/model/head.hpp>

namespace isobath::model {

Probe probe_gradients(const CheckpointReader& checkpoint, const at::Tensor& tokens, at::ScalarType dtype) {
  const ModelConfig& config = checkpoint.config();
  const Rotary rotary = Rotary::make(config, tokens.size(1), at::kCPU);
  std::vector<BlockWeights> blocks;
  std::vector<BlockActivations> activations(static_cast<size_t>(config.n_blocks));
  at::Tensor hidden = embed(checkpoint.read_embedding(dtype, at::kCPU), tokens);
  for (int64_t block = 0; block < config.n_blocks; ++block) {
    blocks.push_back(checkpoint.read_block(block, dtype, at::kCPU));
    hidden = block_forward(config, rotary, blocks.back(), hidden, &activations[static_cast<size_t>(block)]);
  }

  const HeadWeights head = checkpoint.read_head(dtype, at::kCPU);
  const at::Tensor lengths = at::full({tokens.size(0)}, tokens.size(1), at::kInt);
  const LossResult loss = loss_and_gradient(config, head, hidden, tokens, lengths, {0, tokens.size(0)}, {});

  Probe probe{.logits = head_logits(config, head, hidden), .nll_sum = loss.nll_sum, .gradients = {}};
  probe.gradients["hidden"] = loss.gradient[0];
  at::Tensor gradient = loss.gradient[0];
  for (int64_t block = config.n_blocks - 1; block >= 0; --block)
    gradient = block_backward(config, rotary, blocks[static_cast<size_t>(block)],
                              activations[static_cast<size_t>(block)], gradient,
                              [&](Projection p, const at::Tensor&, const at::Tensor& output_gradient) {
                                probe.gradients[module_name(block, p)] = output_gradient;
                              });
  return probe;
}

}  // namespace isobath::model
