#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <isobath/comm/device_communicator.hpp>
#include <isobath/core/error.hpp>

#include "support/mpi_environment.hpp"

namespace isobath::comm {
namespace {

using isobath::testing::world;

class DeviceCommunicatorTest : public ::testing::Test {
 protected:
  DeviceCommunicatorTest()
      : node_(world().node()), device_(select_device("auto", node_)), comm_(world(), device_) {}

  int next() const { return (world().rank() + 1) % world().size(); }
  int previous() const { return (world().rank() + world().size() - 1) % world().size(); }
  at::Tensor values(int rank) const {
    return (at::arange(12, at::kFloat).reshape({3, 4}) + 100 * rank).to(device_);
  }

  Communicator node_;
  c10::Device device_;
  DeviceCommunicator comm_;
};

TEST_F(DeviceCommunicatorTest, PassesTensorsRoundARing) {
  at::Tensor received = at::zeros({3, 4}).to(device_);
  DeviceCommunicator::Transfer receive = comm_.receive_async(received, previous(), 1);
  DeviceCommunicator::Transfer send = comm_.send_async(values(world().rank()), next(), 1);
  receive.wait();
  send.wait();
  EXPECT_TRUE(at::equal(received, values(previous())));
  receive.wait();  // waiting twice is allowed
}

TEST_F(DeviceCommunicatorTest, StagesATensorThatIsNotContiguousThroughACopy) {
  at::Tensor received = at::zeros({4, 3}, at::kFloat).t();
  DeviceCommunicator::Transfer receive = comm_.receive_async(received, previous(), 2);
  DeviceCommunicator::Transfer send =
      comm_.send_async(values(world().rank()).cpu().t().contiguous().t(), next(), 2);
  receive.wait();
  send.wait();
  EXPECT_TRUE(at::equal(received, values(previous()).cpu()));
}

TEST_F(DeviceCommunicatorTest, BroadcastsFromEveryRoot) {
  for (int root = 0; root < world().size(); ++root) {
    at::Tensor tensor = world().rank() == root ? values(root) : at::zeros({3, 4}).to(device_);
    comm_.broadcast(tensor, root);
    EXPECT_TRUE(at::equal(tensor, values(root)));
    at::Tensor strided = world().rank() == root ? values(root).cpu().t() : at::zeros({3, 4}).t();
    comm_.broadcast(strided, root);
    EXPECT_TRUE(at::equal(strided, values(root).cpu().t()));
  }
}

TEST_F(DeviceCommunicatorTest, NamesItsDevice) {
  EXPECT_EQ(comm_.device(), device_);
  EXPECT_EQ(select_device("cpu", node_), c10::Device(c10::kCPU));
  EXPECT_THROW(static_cast<void>(select_device("tpu", node_)), ConfigError);
  if (std::string(device_backend_name()) == "host") {
    EXPECT_THROW(static_cast<void>(select_device("cuda", node_)), ConfigError);
    EXPECT_TRUE(device_.is_cpu());
  }
}

}  // namespace
}  // namespace isobath::comm
