#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <chrono>
#include <ctime>
#include <isobath/comm/communicator.hpp>
#include <isobath/core/timer.hpp>
#include <thread>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

int next_rank() {
  return (world().rank() + 1) % world().size();
}
int previous_rank() {
  return (world().rank() + world().size() - 1) % world().size();
}

at::Tensor ramp(int64_t n, int from_rank) {
  return at::arange(n, at::kFloat) + static_cast<float>(1000 * from_rank);
}

TEST(PointToPoint, ARingPassesTensorsOfEverySize) {
  for (const int64_t n : {0, 1, 1000, 300000}) {
    at::Tensor received = at::zeros({n});
    Request send = world().send_async(ramp(n, world().rank()), next_rank(), 7);
    world().receive(received, previous_rank(), 7);
    send.wait();
    EXPECT_TRUE(at::equal(received, ramp(n, previous_rank()))) << n;
  }
}

TEST(PointToPoint, ALongTransferIsCutAndPutTogether) {
  Communicator cut = world().duplicate();
  for (const int64_t limit : {4, 12, 4096, 100000}) {
    cut.set_message_limit(limit);
    at::Tensor received = at::zeros({1025});
    Request send = cut.send_async(ramp(1025, cut.rank()), next_rank(), 0);
    cut.receive(received, previous_rank(), 0);
    send.wait();
    EXPECT_TRUE(at::equal(received, ramp(1025, previous_rank()))) << limit;
  }
}

TEST(PointToPoint, ManyTransfersUnderWayKeepTheirTags) {
  constexpr int kTransfers = 16;
  std::vector<at::Tensor> received;
  std::vector<Request> requests;
  for (int tag = 0; tag < kTransfers; ++tag) {
    received.push_back(at::zeros({2000}));
    requests.push_back(world().receive_async(received.back(), previous_rank(), tag));
  }
  for (int tag = kTransfers - 1; tag >= 0; --tag) {
    requests.push_back(world().send_async(ramp(2000, world().rank()) + tag, next_rank(), tag));
  }
  for (Request& request : requests) request.wait();
  for (int tag = 0; tag < kTransfers; ++tag) {
    EXPECT_TRUE(at::equal(received[static_cast<size_t>(tag)], ramp(2000, previous_rank()) + tag)) << tag;
  }
}

TEST(PointToPoint, ARequestCanBeTestedWhileComputing) {
  at::Tensor received = at::zeros({100000});
  Request receive = world().receive_async(received, previous_rank(), 1);
  EXPECT_TRUE(receive.active());
  Request send = world().send_async(ramp(100000, world().rank()), next_rank(), 1);
  double sum = 0;
  while (!receive.test() || !send.test()) sum += at::ones({1000}).sum().item<double>();
  EXPECT_FALSE(receive.active());
  EXPECT_GE(sum, 0);
  EXPECT_TRUE(receive.test());  // done stays done
  receive.wait();
  EXPECT_TRUE(at::equal(received, ramp(100000, previous_rank())));
}

TEST(PointToPoint, ARequestKeepsItsTensorAlive) {
  at::Tensor received = at::zeros({300000});
  Request send;
  {
    const at::Tensor temporary = ramp(300000, world().rank());
    send = world().send_async(temporary, next_rank(), 2);
  }
  const at::Tensor likely_reuses_the_memory = at::full({300000}, -1.0f);
  world().receive(received, previous_rank(), 2);
  send.wait();
  EXPECT_TRUE(at::equal(received, ramp(300000, previous_rank())));
  EXPECT_EQ(likely_reuses_the_memory[0].item<float>(), -1.0f);
}

TEST(PointToPoint, AShorterMessageThanExpectedIsAnError) {
  at::Tensor received = at::zeros({10});
  Request send = world().send_async(at::ones({9}), next_rank(), 3);
  EXPECT_THROW(world().receive(received, previous_rank(), 3), InternalError);
  send.wait();
}

TEST(PointToPoint, ALongerMessageThanExpectedIsAnErrorThatNamesTheCall) {
  at::Tensor received = at::zeros({9});
  Request send = world().send_async(at::ones({10}), next_rank(), 4);
  try {
    world().receive(received, previous_rank(), 4);
    ADD_FAILURE() << "the message was cut silently";
  } catch (const InternalError& error) {
    EXPECT_NE(std::string(error.what()).find("MPI_Test"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("point_to_point.cpp"), std::string::npos) << error.what();
  }
  send.wait();
}

TEST(PointToPoint, ABadPeerOrTagIsRefused) {
  at::Tensor tensor = at::zeros({1});
  EXPECT_THROW(world().send(tensor, world().size(), 0), InternalError);
  EXPECT_THROW(world().send(tensor, 0, 16000), InternalError);
  EXPECT_THROW(world().send(tensor.expand({4}), 0, 0), InternalError);
}

TEST(PointToPoint, ALongMessageArrivesWhileItsSenderIsOutsideMpi) {
  if (world().size() < 2) GTEST_SKIP() << "one rank sends to none";
  constexpr int64_t kValues = 1 << 21;  // 8 MB: no transport takes it in one piece
  constexpr std::chrono::seconds kOutside{3};
  world().barrier();
  const Timer timer;
  if (world().rank() == 0) {
    Request send = world().send_async(at::ones({kValues}), 1, 0);
    std::this_thread::sleep_for(kOutside);
    send.wait();
  } else if (world().rank() == 1) {
    at::Tensor received = at::zeros({kValues});
    world().receive(received, 0, 0);
    EXPECT_LT(timer.seconds(), std::chrono::duration<double>(kOutside).count() / 2);
    EXPECT_EQ(received.sum().item<float>(), static_cast<float>(kValues));
  }
  world().barrier();
}

TEST(PointToPoint, AWaitingRankLeavesTheCoreToOthersWhereTheyShareCores) {
  if (std::thread::hardware_concurrency() >= static_cast<unsigned>(world().size()))
    GTEST_SKIP() << "there is a core for each rank: waits keep theirs";
  // A spinning wait takes all of the time; with sleeps of 200 µs the rest is a few percent.
  constexpr double kLargestBusyShare = 0.5;
  constexpr std::chrono::milliseconds kDelay{400};
  world().barrier();
  const std::clock_t start_cpu = std::clock();
  const Timer timer;
  if (world().rank() == 0) std::this_thread::sleep_for(kDelay);
  world().barrier();
  const double busy_s = static_cast<double>(std::clock() - start_cpu) / CLOCKS_PER_SEC;
  EXPECT_LT(busy_s, kLargestBusyShare * timer.seconds());
}

}  // namespace
}  // namespace isobath::comm
