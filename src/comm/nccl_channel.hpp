#pragma once
#include <c10/core/Device.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <functional>
#include <source_location>
#include <utility>

namespace isobath::comm {

[[noreturn]] void cuda_failed(cudaError_t code, const char* call, std::source_location where);
[[noreturn]] void nccl_failed(ncclResult_t code, ncclComm_t comm, const char* call,
                              std::source_location where);

inline void check_cuda(cudaError_t code, const char* call,
                       std::source_location where = std::source_location::current()) {
  if (code != cudaSuccess) [[unlikely]]
    cuda_failed(code, call, where);
}

/// Accepts ncclInProgress: communicators are non-blocking, and the caller polls them.
inline void check_nccl(ncclResult_t code, ncclComm_t comm, const char* call,
                       std::source_location where = std::source_location::current()) {
  if (code != ncclSuccess && code != ncclInProgress) [[unlikely]]
    nccl_failed(code, comm, call, where);
}

/// A CUDA event without timing; move-only.
class CudaEvent {
 public:
  CudaEvent();
  ~CudaEvent();
  CudaEvent(CudaEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  CudaEvent& operator=(CudaEvent&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  [[nodiscard]] cudaEvent_t get() const { return event_; }
  [[nodiscard]] bool done() const;

 private:
  cudaEvent_t event_ = nullptr;
};

/// A non-blocking NCCL communicator with a stream of its own. Transfers of one channel run in the order of
/// the calls; channels do not wait for each other.
class NcclChannel {
 public:
  /// Collective over the `n_ranks` ranks of the channel.
  NcclChannel(const ncclUniqueId& id, int n_ranks, int rank, c10::Device device);
  ~NcclChannel();
  NcclChannel(const NcclChannel&) = delete;
  NcclChannel& operator=(const NcclChannel&) = delete;

  /// Enqueues `launch` behind the work of the current stream of this thread. The event comes after the
  /// transfer.
  [[nodiscard]] CudaEvent enqueue(const std::function<ncclResult_t(ncclComm_t, cudaStream_t)>& launch);
  /// Polls with back-off until `event` has passed; a failure of a peer or of the network is thrown as an
  /// error.
  void wait(const CudaEvent& event, const char* operation) const;

 private:
  /// Throws the asynchronous error of the communicator, if it has one; whether no call is in progress.
  [[nodiscard]] bool is_settled() const;

  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  c10::Device device_;
};

}  // namespace isobath::comm

#define ISOBATH_CUDA(call) ::isobath::comm::check_cuda((call), #call)
#define ISOBATH_NCCL(handle, call) ::isobath::comm::check_nccl((call), (handle), #call)
