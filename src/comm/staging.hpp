#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/comm/communicator.hpp>

namespace isobath::comm {

/// A transfer over MPI of a tensor that MPI cannot read or write in place (another device, or not
/// contiguous): it goes through a contiguous copy in host memory. Any other tensor goes without a copy.
class StagedTransfer {
 public:
  [[nodiscard]] static StagedTransfer send(const Communicator& comm, const at::Tensor& tensor,
                                           int destination, int tag);
  [[nodiscard]] static StagedTransfer receive(const Communicator& comm, at::Tensor& tensor, int source,
                                              int tag);
  [[nodiscard]] static StagedTransfer broadcast(const Communicator& comm, at::Tensor& tensor, int root);
  void wait();

 private:
  Request request_;
  at::Tensor staged_;       // defined while a receive goes through a copy
  at::Tensor destination_;  // where `wait` copies it to
};

}  // namespace isobath::comm
