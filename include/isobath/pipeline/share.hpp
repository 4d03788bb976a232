#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/comm/communicator.hpp>

namespace isobath::pipeline {

/// Gives every rank the whole of a tensor to which each rank contributed its own elements and left the others
/// zero. A sum of bytes, of which at most one is not zero: exact for every dtype and in every order.
///
/// tensor   contiguous CPU, same shape on all ranks. Cost: one all-reduce of its bytes. Collective over
/// `comm`.
inline void share_disjoint(at::Tensor& tensor, const comm::Communicator& comm) {
  ISOBATH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "share_disjoint takes contiguous CPU tensors");
  comm.all_reduce(std::span<uint8_t>(static_cast<uint8_t*>(tensor.mutable_data_ptr()), tensor.nbytes()),
                  comm::Reduce::sum);
}

}  // namespace isobath::pipeline
