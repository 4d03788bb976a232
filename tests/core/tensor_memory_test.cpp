#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/tensor_memory.hpp>
#include <thread>

namespace isobath {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

at::Tensor tensor_of(int64_t n_bytes) {
  return at::empty({n_bytes}, at::kByte);
}

class TensorMemoryTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { map_tensors(); }
  void SetUp() override {
    unmap_kept_tensors();
    ASSERT_EQ(tensor_memory().live_bytes, 0);
  }
};

TEST_F(TensorMemoryTest, TheNextTensorOfASizeGetsTheMappingOfTheLast) {
  at::Tensor first = tensor_of(4 * kMiB);
  const void* place = first.data_ptr();
  EXPECT_EQ(tensor_memory().live_bytes, 4 * kMiB);
  first.reset();
  EXPECT_EQ(tensor_memory().live_bytes, 0);
  EXPECT_EQ(tensor_memory().kept_bytes, 4 * kMiB);
  // Of nearly the size, and larger.
  const at::Tensor second = tensor_of(4 * kMiB - 5);
  EXPECT_EQ(second.data_ptr(), place);
  EXPECT_EQ(tensor_memory().kept_bytes, 0);
}

TEST_F(TensorMemoryTest, LiveAndKeptHardlyExceedWhatLivedAtOnce) {
  std::vector<at::Tensor> held;
  for (int i = 0; i < 4; ++i) held.push_back(tensor_of((2 + i) * kMiB));  // 14 MiB at once
  held.clear();
  EXPECT_EQ(tensor_memory().kept_bytes, 14 * kMiB);
  // Another size: the oldest two, of 2 and 3 MiB, make room for it; the bound is 14 7/8 MiB.
  const at::Tensor other = tensor_of(4 * kMiB + 1);
  const TensorMemory memory = tensor_memory();
  EXPECT_EQ(memory.kept_bytes, 9 * kMiB);
  EXPECT_EQ(memory.live_bytes, 4 * kMiB + (kMiB >> 4));
  EXPECT_EQ(memory.peak_bytes, 14 * kMiB);
  // One that is larger than all before leaves none.
  const at::Tensor large = tensor_of(20 * kMiB);
  EXPECT_EQ(tensor_memory().kept_bytes, 0);
}

TEST_F(TensorMemoryTest, EveryTensorHasItsOwnMemoryAndIsZeroWhereAsked) {
  std::vector<at::Tensor> tensors;
  for (int round = 0; round < 3; ++round) {
    for (int64_t i = 0; i < 6; ++i) tensors.push_back(at::full({i % 2 == 0 ? kMiB : 100}, i, at::kLong));
    for (int64_t i = 0; i < 6; ++i)
      EXPECT_TRUE(
          at::equal(tensors[static_cast<size_t>(i)], at::full_like(tensors[static_cast<size_t>(i)], i)));
    tensors.clear();
    EXPECT_EQ(at::zeros({kMiB}, at::kLong).count_nonzero().item<int64_t>(), 0);
  }
}

TEST_F(TensorMemoryTest, SmallTensorsAreNotMapped) {
  const at::Tensor small = tensor_of(kMappedBytes - 1), none = tensor_of(0);
  EXPECT_EQ(tensor_memory().live_bytes, 0);
  const at::Tensor least = tensor_of(kMappedBytes);
  EXPECT_EQ(tensor_memory().live_bytes, kMappedBytes);
}

TEST_F(TensorMemoryTest, ATensorMayGoInAnotherThread) {
  at::Tensor tensor = tensor_of(kMiB);
  std::thread([moved = std::move(tensor)]() mutable { moved.reset(); }).join();
  EXPECT_EQ(tensor_memory().live_bytes, 0);
  EXPECT_EQ(tensor_memory().kept_bytes, kMiB);
}

}  // namespace
}  // namespace isobath
