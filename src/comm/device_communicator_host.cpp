#include <ATen/ATen.h>

#include <isobath/comm/device_communicator.hpp>

#include "staging.hpp"

namespace isobath::comm {

struct DeviceCommunicator::State {
  const Communicator* comm;
  c10::Device device;
};

struct DeviceCommunicator::Transfer::State {
  StagedTransfer staged;
};

DeviceCommunicator::DeviceCommunicator(const Communicator& comm, c10::Device device)
    : state_(std::make_unique<State>(State{&comm, device})) {}
DeviceCommunicator::~DeviceCommunicator() = default;
DeviceCommunicator::DeviceCommunicator(DeviceCommunicator&&) noexcept = default;
DeviceCommunicator& DeviceCommunicator::operator=(DeviceCommunicator&&) noexcept = default;

DeviceCommunicator::Transfer::Transfer() = default;
DeviceCommunicator::Transfer::~Transfer() = default;
DeviceCommunicator::Transfer::Transfer(Transfer&&) noexcept = default;
DeviceCommunicator::Transfer& DeviceCommunicator::Transfer::operator=(Transfer&&) noexcept = default;

void DeviceCommunicator::Transfer::wait() {
  if (state_) state_->staged.wait();
  state_.reset();
}

DeviceCommunicator::Transfer DeviceCommunicator::send_async(const at::Tensor& tensor, int destination,
                                                            int tag) const {
  Transfer transfer;
  transfer.state_ = std::make_unique<Transfer::State>(
      Transfer::State{StagedTransfer::send(*state_->comm, tensor, destination, tag)});
  return transfer;
}

DeviceCommunicator::Transfer DeviceCommunicator::receive_async(at::Tensor& tensor, int source,
                                                               int tag) const {
  Transfer transfer;
  transfer.state_ = std::make_unique<Transfer::State>(
      Transfer::State{StagedTransfer::receive(*state_->comm, tensor, source, tag)});
  return transfer;
}

DeviceCommunicator::Transfer DeviceCommunicator::broadcast_async(at::Tensor& tensor, int root) const {
  Transfer transfer;
  transfer.state_ = std::make_unique<Transfer::State>(
      Transfer::State{StagedTransfer::broadcast(*state_->comm, tensor, root)});
  return transfer;
}

c10::Device DeviceCommunicator::device() const {
  return state_->device;
}

const Communicator& DeviceCommunicator::ranks() const {
  return *state_->comm;
}

c10::Device select_device(const std::string& requested, const Communicator&) {
  if (requested == "auto" || requested == "cpu") return c10::kCPU;
  if (requested == "cuda") {
    fail<ConfigError>(
        "device 'cuda' was requested, but this isobath was built without CUDA: use 'cpu' or 'auto', or "
        "build the 'cuda' preset");
  }
  fail<ConfigError>("unknown device '{}': expected auto, cpu or cuda", requested);
}

int64_t device_memory_bytes(c10::Device) {
  return 0;
}

int64_t device_peak_bytes(c10::Device) {
  return 0;
}

std::string device_identity(c10::Device) {
  return {};
}

const char* device_backend_name() {
  return "host";
}

}  // namespace isobath::comm
