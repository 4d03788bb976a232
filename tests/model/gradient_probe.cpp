#include "model/gradient_probe.hpp"

#include <ATen/ATen.h>

#include <isobath/model/block.hpp>
#include <isobath/model/head.hpp>

namespace isobath::model {

Probe probe_gradients(const CheckpointReader& checkpoint, const at::Tensor& tokens, at::ScalarType dtype) {
  const ModelConfig& config = checkpoint.config();
  const Rotary rotary = Rotary::make(config, tokens.size(1), at::kCPU);
  std::map<std::string, at::Tensor> outputs;

  at::Tensor hidden = embed(checkpoint.read_embedding(dtype, at::kCPU), tokens).requires_grad_();
  for (int64_t block = 0; block < config.n_blocks; ++block) {
    const BlockWeights weights = checkpoint.read_block(block, dtype, at::kCPU);
    hidden = block_forward(config, rotary, weights, hidden,
                           [&](Projection p, const at::Tensor& x, const Linear& linear) {
                             at::Tensor output = apply_linear(x, linear);
                             output.retain_grad();
                             outputs[module_name(block, p)] = output;
                             return output;
                           });
  }

  const HeadWeights head = checkpoint.read_head(dtype, at::kCPU);
  const at::Tensor lengths = at::full({tokens.size(0)}, tokens.size(1), at::kInt);
  const LossResult loss =
      loss_and_gradient(config, head, hidden.detach(), tokens, lengths, {0, tokens.size(0)}, {});
  hidden.backward(loss.gradient[0]);

  Probe probe{.logits = head_logits(config, head, hidden.detach()), .nll_sum = loss.nll_sum, .gradients = {}};
  for (const auto& [name, output] : outputs) probe.gradients[name] = output.grad();
  probe.gradients["hidden"] = loss.gradient[0];
  return probe;
}

}  // namespace isobath::model
