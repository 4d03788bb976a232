#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <isobath/comm/communicator.hpp>
#include <numeric>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

template <class T>
class TypedCollectives : public ::testing::Test {};
using CountableTypes = ::testing::Types<int32_t, int64_t, uint64_t, float, double, uint8_t>;
TYPED_TEST_SUITE(TypedCollectives, CountableTypes);

TYPED_TEST(TypedCollectives, BroadcastReachesEveryRankFromEveryRoot) {
  for (int root = 0; root < world().size(); ++root) {
    std::vector<TypeParam> values(37);
    if (world().rank() == root) std::iota(values.begin(), values.end(), static_cast<TypeParam>(root));
    world().broadcast(std::span(values), root);
    for (size_t i = 0; i < values.size(); ++i)
      EXPECT_EQ(values[i], static_cast<TypeParam>(root + static_cast<int>(i)));
  }
}

TYPED_TEST(TypedCollectives, MinAndMaxAreThoseOfAllRanks) {
  const auto local = static_cast<TypeParam>(10 + world().rank());
  EXPECT_EQ(world().all_reduce(local, Reduce::min), static_cast<TypeParam>(10));
  EXPECT_EQ(world().all_reduce(local, Reduce::max), static_cast<TypeParam>(9 + world().size()));
}

TEST(Collectives, IntegerSumsAddAllRanks) {
  const int64_t n = world().size();
  EXPECT_EQ(world().all_reduce<int64_t>(world().rank() + 1, Reduce::sum), n * (n + 1) / 2);
}

TEST(Collectives, FloatingPointSumsAreRefusedOnEveryRank) {
  EXPECT_THROW(static_cast<void>(world().all_reduce(1.0, Reduce::sum)), InternalError);
}

TEST(Collectives, PiecesOfALongTransferLandInTheirPlaces) {
  Communicator cut = world().duplicate();
  for (const int64_t limit : {8, 24, 1000, 4096}) {
    cut.set_message_limit(limit);
    for (const int64_t n : {0, 1, 3, 511, 512, 513}) {
      std::vector<int64_t> values(static_cast<size_t>(n));
      if (cut.rank() == cut.size() - 1) std::iota(values.begin(), values.end(), 5);
      cut.broadcast(std::span(values), cut.size() - 1);
      for (int64_t i = 0; i < n; ++i) EXPECT_EQ(values[static_cast<size_t>(i)], 5 + i) << "limit " << limit;
      cut.all_reduce(std::span(values), Reduce::sum);
      for (int64_t i = 0; i < n; ++i) EXPECT_EQ(values[static_cast<size_t>(i)], cut.size() * (5 + i));
    }
  }
}

TEST(Collectives, TensorsOfAnyDtypeAreBroadcast) {
  for (const at::ScalarType dtype :
       {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble, at::kLong, at::kByte, at::kBool}) {
    const at::Tensor expected = at::arange(6, at::kFloat).reshape({2, 3}).to(dtype);
    at::Tensor tensor = world().rank() == 0 ? expected.clone() : at::zeros_like(expected);
    world().broadcast(tensor, 0);
    EXPECT_TRUE(at::equal(tensor, expected)) << c10::toString(dtype);
  }
}

TEST(Collectives, StartedBroadcastsArriveAmongOtherCollectives) {
  Communicator cut = world().duplicate();
  cut.set_message_limit(1 << 16);
  const at::Tensor expected = at::arange(200000, at::kFloat);
  std::vector<at::Tensor> tensors;
  std::vector<Request> requests;
  for (int root = 0; root < cut.size(); ++root) {
    tensors.push_back(cut.rank() == root ? expected + root : at::zeros_like(expected));
    requests.push_back(cut.broadcast_async(tensors.back(), root));
    EXPECT_EQ(cut.all_reduce(int64_t{1}, Reduce::sum), cut.size());
  }
  for (Request& request : requests) request.wait();
  for (int root = 0; root < cut.size(); ++root)
    EXPECT_TRUE(at::equal(tensors[static_cast<size_t>(root)], expected + root));
}

TEST(Collectives, ATensorThatIsNotContiguousIsRefused) {
  at::Tensor tensor = at::zeros({4, 3}).t();
  EXPECT_THROW(world().broadcast(tensor, 0), InternalError);
  EXPECT_THROW((void)world().broadcast_async(tensor, 0), InternalError);
}

TEST(Collectives, TextIsBroadcastWithItsLength) {
  std::string text =
      world().rank() == 0 ? std::string("a\0b — é", 8) : "something longer than the text of the root";
  world().broadcast(text, 0);
  EXPECT_EQ(text, std::string("a\0b — é", 8));
}

TEST(Collectives, GatheredTextsStandInRankOrder) {
  Communicator cut = world().duplicate();
  for (const int64_t limit : {1 << 20, 2}) {  // the second is too small for the total: one broadcast per rank
    cut.set_message_limit(limit);
    const std::vector<std::string> texts =
        cut.all_gather(std::string(static_cast<size_t>(cut.rank() * 3), 'x') + "!");
    ASSERT_EQ(texts.size(), static_cast<size_t>(cut.size()));
    for (size_t r = 0; r < texts.size(); ++r) EXPECT_EQ(texts[r], std::string(r * 3, 'x') + "!");
  }
}

TEST(Collectives, SplitOrdersTheRanksOfAColorByKey) {
  const Communicator half = world().split(world().rank() % 2, -world().rank());
  const int n_same = (world().size() + 1 - world().rank() % 2) / 2;
  EXPECT_EQ(half.size(), n_same);
  EXPECT_EQ(half.rank(), n_same - 1 - world().rank() / 2);
}

TEST(Collectives, ADuplicateKeepsTagsApart) {
  const Communicator other = world().duplicate();
  at::Tensor first = at::full({1}, 1.0), second = at::full({1}, 2.0);
  at::Tensor from_world = at::zeros({1}), from_other = at::zeros({1});
  const int next = (world().rank() + 1) % world().size(),
            previous = (world().rank() + world().size() - 1) % world().size();
  Request a = world().send_async(first, next, 3), b = other.send_async(second, next, 3);
  other.receive(from_other, previous, 3);
  world().receive(from_world, previous, 3);
  a.wait();
  b.wait();
  EXPECT_EQ(from_world.item<double>(), 1.0);
  EXPECT_EQ(from_other.item<double>(), 2.0);
}

TEST(Collectives, RanksOfOneMachineFormOneNode) {
  const Communicator node = world().node();
  EXPECT_EQ(node.size(), world().size());  // CTest starts all ranks on this machine
  EXPECT_EQ(node.rank(), world().rank());
  EXPECT_FALSE(world().host().empty());
}

}  // namespace
}  // namespace isobath::comm
