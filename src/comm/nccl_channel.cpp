#include "nccl_channel.hpp"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <exception>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>

#include "polling.hpp"

namespace isobath::comm {

void cuda_failed(cudaError_t code, const char* call, std::source_location where) {
  fail<InternalError>("{} failed: {} ({}:{})", call, cudaGetErrorString(code), where.file_name(),
                      where.line());
}

void nccl_failed(ncclResult_t code, ncclComm_t comm, const char* call, std::source_location where) {
  fail<InternalError>("{} failed: {}: {} ({}:{}); another rank may have ended, see its message", call,
                      ncclGetErrorString(code), ncclGetLastError(comm), where.file_name(), where.line());
}

CudaEvent::CudaEvent() {
  ISOBATH_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
}

CudaEvent::~CudaEvent() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

bool CudaEvent::done() const {
  const cudaError_t state = cudaEventQuery(event_);
  if (state == cudaErrorNotReady) {
    static_cast<void>(
        cudaGetLastError());  // "not ready" would otherwise be reported by the next kernel launch
    return false;
  }
  ISOBATH_CUDA(state);
  return true;
}

NcclChannel::NcclChannel(const ncclUniqueId& id, int n_ranks, int rank, c10::Device device)
    : device_(device) {
  const c10::cuda::CUDAGuard guard(device_);
  ISOBATH_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ISOBATH_NCCL(comm_, ncclCommInitRankConfig(&comm_, n_ranks, id, rank, &config));
  wait_until("start of NCCL", [this] { return is_settled(); });
}

NcclChannel::~NcclChannel() {
  const c10::cuda::CUDAGuard guard(device_);
  // Finalizing waits for the other ranks, which may not be unwinding.
  bool orderly = std::uncaught_exceptions() == 0;
  if (orderly) {
    try {
      ISOBATH_NCCL(comm_, ncclCommFinalize(comm_));
      wait_until("end of NCCL", [this] { return is_settled(); });
    } catch (const std::exception& error) {
      log::warning("{}", error.what());
      orderly = false;
    }
  }
  static_cast<void>(orderly ? ncclCommDestroy(comm_) : ncclCommAbort(comm_));
  static_cast<void>(cudaStreamDestroy(stream_));
}

bool NcclChannel::is_settled() const {
  ncclResult_t state = ncclSuccess;
  ISOBATH_NCCL(comm_, ncclCommGetAsyncError(comm_, &state));
  check_nccl(state, comm_, "a transfer");
  return state == ncclSuccess;
}

CudaEvent NcclChannel::enqueue(const std::function<ncclResult_t(ncclComm_t, cudaStream_t)>& launch) {
  const c10::cuda::CUDAGuard guard(device_);
  const CudaEvent ready;
  CudaEvent done;
  ISOBATH_CUDA(cudaEventRecord(ready.get(), c10::cuda::getCurrentCUDAStream(device_.index()).stream()));
  ISOBATH_CUDA(cudaStreamWaitEvent(stream_, ready.get(), 0));
  ISOBATH_NCCL(comm_, launch(comm_, stream_));
  // Only after the launch has settled is the transfer in the stream, and the event behind it.
  wait_until("launch of NCCL", [this] { return is_settled(); });
  ISOBATH_CUDA(cudaEventRecord(done.get(), stream_));
  return done;
}

void NcclChannel::wait(const CudaEvent& event, const char* operation) const {
  wait_until(operation, [&] {
    if (event.done()) return true;
    static_cast<void>(is_settled());
    return false;
  });
}

}  // namespace isobath::comm
