#include "staging.hpp"

#include <ATen/ATen.h>

namespace isobath::comm {
namespace {

bool is_direct(const at::Tensor& tensor) {
  return tensor.is_cpu() && tensor.is_contiguous();
}

at::Tensor empty_on_host(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
}

}  // namespace

StagedTransfer StagedTransfer::send(const Communicator& comm, const at::Tensor& tensor, int destination,
                                    int tag) {
  StagedTransfer transfer;
  transfer.request_ =
      comm.send_async(is_direct(tensor) ? tensor : tensor.cpu().contiguous(), destination, tag);
  return transfer;
}

StagedTransfer StagedTransfer::receive(const Communicator& comm, at::Tensor& tensor, int source, int tag) {
  StagedTransfer transfer;
  if (is_direct(tensor)) {
    transfer.request_ = comm.receive_async(tensor, source, tag);
  } else {
    transfer.staged_ = empty_on_host(tensor);
    transfer.destination_ = tensor;
    transfer.request_ = comm.receive_async(transfer.staged_, source, tag);
  }
  return transfer;
}

StagedTransfer StagedTransfer::broadcast(const Communicator& comm, at::Tensor& tensor, int root) {
  StagedTransfer transfer;
  if (is_direct(tensor)) {
    transfer.request_ = comm.broadcast_async(tensor, root);
    return transfer;
  }
  at::Tensor staged = comm.rank() == root ? tensor.cpu().contiguous() : empty_on_host(tensor);
  transfer.request_ = comm.broadcast_async(staged, root);
  if (comm.rank() == root) return transfer;
  transfer.staged_ = std::move(staged);
  transfer.destination_ = tensor;
  return transfer;
}

void StagedTransfer::wait() {
  request_.wait();
  if (staged_.defined()) destination_.copy_(staged_);
  staged_.reset();
  destination_.reset();
}

}  // namespace isobath::comm
