#include <isobath/pipeline/hidden_streams.hpp>

#include <ATen/ATen.h>

#include <isobath/comm/tree_sum.hpp>
#include <isobath/kernels/squares.hpp>
#include <isobath/plan/job.hpp>

namespace isobath::pipeline {
namespace {

std::string hidden_name(int64_t microbatch) {
  return fmt::format("hidden/{:08d}", microbatch);
}
std::string original_name(int64_t microbatch) {
  return fmt::format("original/{:08d}", microbatch);
}

double sum_of_squares(const at::Tensor& values) {
  return kernels::row_squares(values).sum(at::kDouble).item<double>();
}

}  // namespace

HiddenStreams::HiddenStreams(const Session& session, const CalibrationSet& calibration, bool with_original)
    : session_(session), calibration_(calibration), quantized_(session, calibration, "quantized") {
  if (with_original) original_.emplace(session, calibration, "original");
}

void HiddenStreams::embed(const at::Tensor& embedding, const at::Tensor& tokens) {
  quantized_.embed(embedding, tokens);
  if (!original_) return;
  for (const data::Microbatch& microbatch : microbatches())
    original_->set_hidden(microbatch.index, quantized_.hidden(microbatch.index).clone());
}

ForEachInput HiddenStreams::inputs(int set, const model::BlockWeights& weights) const {
  const int64_t n_residual =
      plan::residual_channels(session_.config.quantization, session_.model(), model::input_set(set).front());
  return [this, set, n_residual, &weights](const VisitInput& visit) {
    for (const data::Microbatch& microbatch : microbatches()) {
      const int64_t index = microbatch.index;
      Original original;
      if (original_) original.input = original_->input(set, original_weights_, index);
      if (n_residual > 0)
        original.residual = original_->hidden(index).to(at::kFloat) - quantized_.hidden(index);
      visit(microbatch, quantized_.input(set, weights, index), original);
    }
  };
}

void HiddenStreams::advance(int set, const model::BlockWeights& weights, int64_t block) {
  quantized_.advance(set, weights, block);
  if (original_) original_->advance(set, original_weights_, block);
}

std::optional<double> HiddenStreams::deviation() const {
  if (!original_) return {};
  const comm::Communicator& world = session_.world();
  comm::TreeSum tree(calibration_.shards.owners(world.size()), world.rank());
  at::Tensor sums;
  int64_t shard = -1;
  for (const data::Microbatch& microbatch : microbatches()) {
    if (microbatch.shard != shard) {
      if (shard >= 0) tree.add(shard, sums);
      shard = microbatch.shard;
      sums = at::zeros({2}, at::kDouble);
    }
    // What padding becomes is nobody's loss.
    const at::Tensor mask = calibration_.mask_of(microbatch.sequences);
    const auto real = [&](const at::Tensor& hidden) {
      return mask.defined() ? hidden.masked_fill(mask.logical_not().unsqueeze(2).to(hidden.device()), 0)
                            : hidden;
    };
    const at::Tensor original = real(original_->hidden(microbatch.index)).to(at::kFloat);
    sums[0] += sum_of_squares(real(quantized_.hidden(microbatch.index)).to(at::kFloat) - original);
    sums[1] += sum_of_squares(original);
  }
  if (shard >= 0) tree.add(shard, sums);
  at::Tensor total = tree.reduce_to(0, world);
  if (!total.defined()) total = at::zeros({2}, at::kDouble);
  world.broadcast(total, 0);
  const auto norm = total[1].item<double>();
  return norm > 0 ? total[0].item<double>() / norm : 0.0;
}

std::vector<std::pair<std::string, at::Tensor>> HiddenStreams::state() const {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const data::Microbatch& microbatch : microbatches()) {
    tensors.emplace_back(hidden_name(microbatch.index), quantized_.hidden(microbatch.index).cpu());
    if (original_)
      tensors.emplace_back(original_name(microbatch.index), original_->hidden(microbatch.index).cpu());
  }
  return tensors;
}

void HiddenStreams::restore(const checkpoint::Generation& generation) {
  for (const data::Microbatch& microbatch : microbatches()) {
    const int64_t index = microbatch.index;
    quantized_.set_hidden(index, generation.read(hidden_name(index)).to(session_.device));
    if (original_) original_->set_hidden(index, generation.read(original_name(index)).to(session_.device));
  }
}

}  // namespace isobath::pipeline
