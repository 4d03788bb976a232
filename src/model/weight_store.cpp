#include <ATen/core/Tensor.h>

#include <future>
#include <isobath/core/error.hpp>
#include <isobath/core/host_memory.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/model/weight_store.hpp>
#include <map>

namespace isobath::model {

struct WeightStore::State {
  std::shared_ptr<const CheckpointReader> checkpoint;
  at::ScalarType dtype;
  c10::Device device;
  bool is_streamed;
  // Of resident weights.
  std::map<int64_t, BlockWeights> blocks = {};
  at::Tensor embedding = {};
  HeadWeights head = {};
  // Of streamed weights: the block that another thread reads. The future's destructor joins that thread.
  int64_t ahead = -1;
  std::future<BlockWeights> reading = {};
};

WeightStore::WeightStore(std::unique_ptr<State> state) : state_(std::move(state)) {}
WeightStore::~WeightStore() = default;
WeightStore::WeightStore(WeightStore&&) noexcept = default;
WeightStore& WeightStore::operator=(WeightStore&&) noexcept = default;

WeightStore WeightStore::resident(std::shared_ptr<const CheckpointReader> checkpoint, at::ScalarType dtype,
                                  c10::Device device, const Share& share) {
  auto state = std::make_unique<State>(State{std::move(checkpoint), dtype, device, /*is_streamed=*/false});
  for (int64_t block = share.blocks.begin; block < share.blocks.end; ++block)
    state->blocks.emplace(block, state->checkpoint->read_block(block, dtype, device));
  if (share.embedding) state->embedding = state->checkpoint->read_embedding(dtype, device);
  if (share.head) state->head = state->checkpoint->read_head(dtype, device, state->embedding);
  return WeightStore(std::move(state));
}

WeightStore WeightStore::streamed(std::shared_ptr<const CheckpointReader> checkpoint, at::ScalarType dtype,
                                  c10::Device device) {
  return WeightStore(
      std::make_unique<State>(State{std::move(checkpoint), dtype, device, /*is_streamed=*/true}));
}

bool WeightStore::is_streamed() const {
  return state_->is_streamed;
}

bool WeightStore::holds(int64_t block) const {
  return state_->blocks.contains(block);
}

BlockWeights WeightStore::block(int64_t block) const {
  if (!state_->is_streamed) {
    const auto found = state_->blocks.find(block);
    ISOBATH_CHECK(found != state_->blocks.end(), "block {} is not among the {} that this rank holds", block,
                  state_->blocks.size());
    return found->second;
  }
  const trace::Span span("wait for weights from disk", block);
  // A block that came while another was in work leaves a hole in the heap when it goes.
  return_free_memory();
  if (state_->ahead != block) return state_->checkpoint->read_block(block, state_->dtype, state_->device);
  state_->ahead = -1;
  return state_->reading.get();
}

void WeightStore::prefetch(int64_t block) const {
  if (!state_->is_streamed || block == state_->ahead || block < 0 ||
      block >= state_->checkpoint->config().n_blocks)
    return;
  state_->reading = {};
  state_->ahead = block;
  state_->reading = std::async(std::launch::async, [state = state_.get(), block] {
    return state->checkpoint->read_block(block, state->dtype, state->device);
  });
}

void WeightStore::replace(int64_t block, Projection projection, const at::Tensor& weight) {
  const auto found = state_->blocks.find(block);
  ISOBATH_CHECK(!state_->is_streamed && found != state_->blocks.end(), "block {} is not resident", block);
  at::Tensor& held = found->second[projection].weight;
  ISOBATH_CHECK(held.sizes() == weight.sizes() && held.scalar_type() == weight.scalar_type(),
                "a weight of block {} has another shape or dtype", block);
  held.copy_(weight);  // in its place: new tensors would scatter over the memory that passes leave
}

at::Tensor WeightStore::embedding() const {
  if (state_->is_streamed) return state_->checkpoint->read_embedding(state_->dtype, state_->device);
  ISOBATH_CHECK(state_->embedding.defined(), "this rank holds no embedding");
  return state_->embedding;
}

HeadWeights WeightStore::head() const {
  if (state_->is_streamed) return state_->checkpoint->read_head(state_->dtype, state_->device);
  ISOBATH_CHECK(state_->head.lm_head.defined(), "this rank holds no head");
  return state_->head;
}

}  // namespace isobath::model
