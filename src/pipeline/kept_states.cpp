#include "kept_states.hpp"

#include <ATen/ATen.h>

#include <isobath/core/trace.hpp>

namespace isobath::pipeline {
namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

}  // namespace

void KeptStates::keep(int64_t block, int64_t item, const at::Tensor& state) {
  const config::Scratch& scratch = session_.config.scratch;
  const auto n_bytes = static_cast<double>(state.nbytes());
  if (scratch.directory.empty() || memory_bytes_ + n_bytes <= scratch.memory_gib * kGiB) {
    in_memory_[{block, item}] = state.cpu();
    memory_bytes_ += n_bytes;
    return;
  }
  const trace::Span span("block input to disk", block);
  auto file = files_.find(block);
  if (file == files_.end()) file = files_.emplace(block, io::ScratchFile(scratch.directory)).first;
  const at::Tensor on_host = state.cpu().contiguous();
  on_disk_[{block, item}] = {on_host.sizes().vec(), file->second.append(on_host)};
}

at::Tensor KeptStates::take(int64_t block, int64_t item) {
  if (const auto found = in_memory_.find({block, item}); found != in_memory_.end()) {
    at::Tensor state = std::move(found->second);
    in_memory_.erase(found);
    memory_bytes_ -= static_cast<double>(state.nbytes());
    return state.to(session_.device);
  }
  const trace::Span span("block input from disk", block);
  const auto place = on_disk_.find({block, item});
  ISOBATH_CHECK(place != on_disk_.end(), "no input of block {} is kept for item {}", block, item);
  at::Tensor state = at::empty(place->second.shape, session_.dtype);
  files_.at(block).read(state, place->second.begin);
  on_disk_.erase(place);
  return state.to(session_.device);
}

}  // namespace isobath::pipeline
