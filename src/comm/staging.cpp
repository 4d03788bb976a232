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

void StagedTransfer::wait() {
  request_.wait();
  if (staged_.defined()) destination_.copy_(staged_);
  staged_.reset();
  destination_.reset();
}

void broadcast_staged(const Communicator& comm, at::Tensor& tensor, int root) {
  if (is_direct(tensor)) return comm.broadcast(tensor, root);
  at::Tensor staged = comm.rank() == root ? tensor.cpu().contiguous() : empty_on_host(tensor);
  comm.broadcast(staged, root);
  if (comm.rank() != root) tensor.copy_(staged);
}

}  // namespace isobath::comm
