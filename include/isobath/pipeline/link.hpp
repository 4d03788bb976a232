#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <deque>
#include <isobath/comm/device_communicator.hpp>
#include <utility>
#include <vector>

namespace isobath::pipeline {

/// One direction of a pipeline: tensors leave to one neighbour and arrive from the other, in order, while the
/// stage computes. Forward and backward use separate links, so that a device backend with one queue a link
/// cannot wait in a circle.
class Link {
 public:
  /// Collective over `pipeline`. source, destination: ranks in it; −1: none.
  Link(const comm::Communicator& pipeline, c10::Device device, int source, int destination)
      : comm_(pipeline.duplicate()),
        device_comm_(comm_, device),
        source_(source),
        destination_(destination) {}

  /// Starts sending `tensor` (kept alive until sent). Waits for the send before the previous one: at most two
  /// are under way.
  void send(at::Tensor tensor) {
    if (destination_ < 0) return;
    while (outgoing_.size() >= 2) finish_oldest_send();
    tensor = tensor.contiguous();
    auto transfer = device_comm_.send_async(tensor, destination_, 0);
    outgoing_.emplace_back(std::move(tensor), std::move(transfer));
  }

  /// Starts receiving the next tensor. Call after the send of the previous step, never before.
  void expect(at::IntArrayRef shape, at::TensorOptions options) {
    incoming_ = at::empty(shape, options);
    arriving_ = device_comm_.receive_async(incoming_, source_, 0);
  }

  /// The tensor that `expect` announced.
  [[nodiscard]] at::Tensor take() {
    arriving_.wait();
    return std::move(incoming_);
  }

  /// Waits until everything has left.
  void flush() {
    while (!outgoing_.empty()) finish_oldest_send();
  }

 private:
  void finish_oldest_send() {
    outgoing_.front().second.wait();
    outgoing_.pop_front();
  }

  comm::Communicator comm_;
  comm::DeviceCommunicator device_comm_;
  int source_, destination_;
  at::Tensor incoming_;
  comm::DeviceCommunicator::Transfer arriving_;
  std::deque<std::pair<at::Tensor, comm::DeviceCommunicator::Transfer>> outgoing_;
};

}  // namespace isobath::pipeline
