#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/io/safetensors_writer.hpp>
#include <isobath/model/weight_store.hpp>

#include "model/scratch_directory.hpp"

namespace isobath::model {
namespace {

const std::filesystem::path kTiny = std::filesystem::path(ISOBATH_TEST_DATA) / "tiny_llama_b";

std::shared_ptr<const CheckpointReader> tiny() {
  return std::make_shared<const CheckpointReader>(kTiny);
}

void expect_equal(const BlockWeights& a, const BlockWeights& b) {
  EXPECT_TRUE(at::equal(a.input_norm, b.input_norm));
  EXPECT_TRUE(at::equal(a.post_attention_norm, b.post_attention_norm));
  for (int p = 0; p < kProjections; ++p)
    EXPECT_TRUE(at::equal(a[static_cast<Projection>(p)].weight, b[static_cast<Projection>(p)].weight)) << p;
}

TEST(WeightStore, StreamedGivesWhatResidentGives) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const int64_t n_blocks = tiny()->config().n_blocks;
    const WeightStore resident = WeightStore::resident(
        tiny(), dtype, at::kCPU, {.blocks = {0, n_blocks}, .embedding = true, .head = true});
    const WeightStore streamed = WeightStore::streamed(tiny(), dtype, at::kCPU);

    for (int64_t block = 0; block < n_blocks; ++block) {
      streamed.prefetch(block);
      expect_equal(streamed.block(block), resident.block(block));
      expect_equal(streamed.block(block), resident.block(block));  // not read ahead
    }
    EXPECT_TRUE(at::equal(streamed.embedding(), resident.embedding()));
    EXPECT_TRUE(at::equal(streamed.head().lm_head, resident.head().lm_head));
    EXPECT_TRUE(resident.holds(0));
    EXPECT_FALSE(streamed.holds(0));
  }
}

TEST(WeightStore, AskingForAnotherBlockThanTheOneReadAheadGivesThatBlock) {
  const WeightStore streamed = WeightStore::streamed(tiny(), at::kFloat, at::kCPU);
  streamed.prefetch(0);
  expect_equal(streamed.block(1), tiny()->read_block(1, at::kFloat, at::kCPU));
  expect_equal(streamed.block(0), tiny()->read_block(0, at::kFloat, at::kCPU));
}

TEST(WeightStore, NothingIsReadAheadBehindTheLastBlock) {
  const WeightStore streamed = WeightStore::streamed(tiny(), at::kFloat, at::kCPU);
  streamed.prefetch(tiny()->config().n_blocks);
  streamed.prefetch(-1);
  expect_equal(streamed.block(0), tiny()->read_block(0, at::kFloat, at::kCPU));
}

TEST(WeightStore, ABlockDiesWithItsLastHandle) {
  const WeightStore streamed = WeightStore::streamed(tiny(), at::kFloat, at::kCPU);
  const BlockWeights block = streamed.block(0);
  EXPECT_EQ(block[Projection::q].weight.use_count(), 1U);
}

TEST(WeightStore, AResidentStoreHasItsShareOnly) {
  const WeightStore resident = WeightStore::resident(tiny(), at::kFloat, at::kCPU,
                                                     {.blocks = {0, 1}, .embedding = false, .head = false});
  EXPECT_THROW((void)resident.block(1), InternalError);
  EXPECT_THROW((void)resident.embedding(), InternalError);
  EXPECT_THROW((void)resident.head(), InternalError);
}

TEST(WeightStore, AnErrorOfReadingAheadIsThrownWhereTheBlockIsTaken) {
  const ScratchDirectory scratch("weight_store_test");
  std::filesystem::copy_file(kTiny / "config.json", scratch.path() / "config.json");
  io::NamedTensors tensors;
  const io::ShardedReader reader(kTiny);
  for (const std::string& name : reader.names()) tensors.emplace_back(name, reader.read(name));
  for (auto& [name, tensor] : tensors)
    if (name == "model.layers.1.mlp.up_proj.weight")
      tensor.view(-1)[3] = std::numeric_limits<float>::infinity();
  io::write_safetensors(scratch.path() / "model.safetensors", tensors, {});
  const WeightStore streamed =
      WeightStore::streamed(std::make_shared<const CheckpointReader>(scratch.path()), at::kFloat, at::kCPU);

  streamed.prefetch(1);
  try {
    (void)streamed.block(1);
    FAIL() << "nothing was thrown";
  } catch (const NumericError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("model.layers.1.mlp.up_proj.weight"), std::string::npos) << text;
    EXPECT_NE(text.find(scratch.path().string()), std::string::npos) << text;
  }
  // The store is as good as before.
  expect_equal(streamed.block(0), tiny()->read_block(0, at::kFloat, at::kCPU));
}

}  // namespace
}  // namespace isobath::model
