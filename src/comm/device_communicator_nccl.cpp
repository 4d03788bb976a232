#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include <fmt/format.h>
#include <isobath/comm/device_communicator.hpp>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <map>
#include <set>
#include <utility>

#include "nccl_channel.hpp"
#include "staging.hpp"

namespace isobath::comm {
namespace {

using Edge = std::pair<int, int>;  // source, destination

at::Tensor as_tensor(ncclUniqueId& id) {
  return at::from_blob(&id, {sizeof(id)}, at::kByte);
}

/// NCCL connects two ranks on their first transfer, whose launch waits until the other one launches its side:
/// done at once, where both do, and not in a pipeline whose neighbours wait for each other's work.
void connect(NcclChannel& channel, bool sends, c10::Device device) {
  at::Tensor byte = at::zeros({1}, at::TensorOptions(device).dtype(at::kByte));
  const CudaEvent done = channel.enqueue([&](ncclComm_t comm, cudaStream_t stream) {
    return sends ? ncclSend(byte.const_data_ptr(), 1, ncclUint8, 1, comm, stream)
                 : ncclRecv(byte.mutable_data_ptr(), 1, ncclUint8, 0, comm, stream);
  });
  channel.wait(done, "first transfer of NCCL");
}

std::shared_ptr<NcclChannel> make_edge(const Communicator& control, Edge edge, c10::Device device) {
  ncclUniqueId id{};
  at::Tensor bytes = as_tensor(id);
  if (control.rank() == edge.first) {
    ISOBATH_NCCL(nullptr, ncclGetUniqueId(&id));
    control.send(bytes, edge.second, 0);
  } else {
    control.receive(bytes, edge.first, 0);
  }
  const bool sends = control.rank() == edge.first;
  auto channel = std::make_shared<NcclChannel>(id, 2, sends ? 0 : 1, device);
  connect(*channel, sends, device);
  return channel;
}

/// Whether any two ranks compute on one device, which NCCL refuses. Collective.
bool share_devices(const Communicator& control, c10::Device device) {
  const std::vector<std::string> devices = control.all_gather(device_identity(device));
  const size_t n_devices = std::set(devices.begin(), devices.end()).size();
  if (n_devices == devices.size()) return false;
  // Once a process: every pipeline and grid has a communicator of its own.
  static bool has_warned = false;
  if (control.rank() == 0 && !std::exchange(has_warned, true))
    log::warning(
        "{} ranks share {} devices: what they send each other goes through host memory instead of NCCL; "
        "one rank for each device is faster",
        devices.size(), n_devices);
  return true;
}

}  // namespace

struct DeviceCommunicator::State {
  const Communicator* comm;
  c10::Device device;
  std::shared_ptr<NcclChannel> everyone;
  /// One channel per direction between neighbours of a pipeline: in a shared one, a send to the next stage
  /// could stand behind a receive that waits for that stage. Other pairs, which the pipeline does not use, go
  /// over MPI.
  std::map<Edge, std::shared_ptr<NcclChannel>> edges;
};

struct DeviceCommunicator::Transfer::State {
  StagedTransfer staged;
  std::shared_ptr<NcclChannel> channel;
  at::Tensor buffer;       // contiguous; what NCCL reads or writes
  at::Tensor destination;  // defined while a receive goes through a buffer of its own
  std::optional<CudaEvent> done;
};

DeviceCommunicator::DeviceCommunicator(const Communicator& comm, c10::Device device)
    : state_(std::make_unique<State>(State{&comm, device, nullptr, {}})) {
  const Communicator control = comm.duplicate();
  // Ranks may sit on different kinds of device; NCCL needs CUDA on all of them.
  if (comm.size() == 1 || control.any(!device.is_cuda()) || share_devices(control, device)) return;
  ncclUniqueId id{};
  if (control.rank() == 0) ISOBATH_NCCL(nullptr, ncclGetUniqueId(&id));
  at::Tensor bytes = as_tensor(id);
  control.broadcast(bytes, 0);
  state_->everyone = std::make_shared<NcclChannel>(id, control.size(), control.rank(), device);
  // Even pairs first, then odd ones: the pairs of one round start at the same time.
  for (int parity = 0; parity < 2; ++parity) {
    const int lower = control.rank() % 2 == parity ? control.rank() : control.rank() - 1;
    if (lower < 0 || lower + 1 >= control.size()) continue;
    for (const Edge& edge : {Edge{lower, lower + 1}, Edge{lower + 1, lower}}) {
      state_->edges[edge] = make_edge(control, edge, device);
    }
  }
}

DeviceCommunicator::~DeviceCommunicator() = default;
DeviceCommunicator::DeviceCommunicator(DeviceCommunicator&&) noexcept = default;
DeviceCommunicator& DeviceCommunicator::operator=(DeviceCommunicator&&) noexcept = default;

DeviceCommunicator::Transfer::Transfer() = default;
DeviceCommunicator::Transfer::Transfer(Transfer&&) noexcept = default;
DeviceCommunicator::Transfer& DeviceCommunicator::Transfer::operator=(Transfer&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}

DeviceCommunicator::Transfer::~Transfer() {
  // NCCL may still use the memory of a transfer that was dropped: it has to outlive the process's CUDA
  // context.
  if (state_ && state_->done) static_cast<void>(state_.release());
}

void DeviceCommunicator::Transfer::wait() {
  if (!state_) return;
  if (state_->done) {
    state_->channel->wait(*state_->done, "device transfer");
    state_->done.reset();
    if (state_->destination.defined()) state_->destination.copy_(state_->buffer);
  }
  state_->staged.wait();
  state_.reset();
}

DeviceCommunicator::Transfer DeviceCommunicator::send_async(const at::Tensor& tensor, int destination,
                                                            int tag) const {
  Transfer transfer;
  transfer.state_ = std::make_unique<Transfer::State>();
  const auto edge = state_->edges.find({state_->comm->rank(), destination});
  if (!tensor.is_cuda() || edge == state_->edges.end()) {
    transfer.state_->staged = StagedTransfer::send(*state_->comm, tensor, destination, tag);
    return transfer;
  }
  transfer.state_->channel = edge->second;
  const at::Tensor buffer = transfer.state_->buffer = tensor.contiguous();
  transfer.state_->done = edge->second->enqueue([&](ncclComm_t comm, cudaStream_t stream) {
    return ncclSend(buffer.const_data_ptr(), buffer.nbytes(), ncclUint8, 1, comm, stream);
  });
  return transfer;
}

DeviceCommunicator::Transfer DeviceCommunicator::receive_async(at::Tensor& tensor, int source,
                                                               int tag) const {
  Transfer transfer;
  transfer.state_ = std::make_unique<Transfer::State>();
  const auto edge = state_->edges.find({source, state_->comm->rank()});
  if (!tensor.is_cuda() || edge == state_->edges.end()) {
    transfer.state_->staged = StagedTransfer::receive(*state_->comm, tensor, source, tag);
    return transfer;
  }
  transfer.state_->channel = edge->second;
  const at::Tensor buffer = transfer.state_->buffer =
      tensor.is_contiguous() ? tensor : at::empty(tensor.sizes(), tensor.options());
  if (!buffer.is_same(tensor)) transfer.state_->destination = tensor;
  transfer.state_->done = edge->second->enqueue([&](ncclComm_t comm, cudaStream_t stream) {
    return ncclRecv(buffer.mutable_data_ptr(), buffer.nbytes(), ncclUint8, 0, comm, stream);
  });
  return transfer;
}

DeviceCommunicator::Transfer DeviceCommunicator::broadcast_async(at::Tensor& tensor, int root) const {
  Transfer transfer;
  if (state_->comm->size() == 1) return transfer;
  transfer.state_ = std::make_unique<Transfer::State>();
  // Decided by the kind of device alone: a layout that only one rank has must not send the ranks different
  // ways.
  if (!tensor.is_cuda() || !state_->everyone) {
    transfer.state_->staged = StagedTransfer::broadcast(*state_->comm, tensor, root);
    return transfer;
  }
  transfer.state_->channel = state_->everyone;
  const at::Tensor buffer = transfer.state_->buffer = tensor.contiguous();
  if (!buffer.is_same(tensor)) transfer.state_->destination = tensor;
  transfer.state_->done = state_->everyone->enqueue([&](ncclComm_t comm, cudaStream_t stream) {
    return ncclBroadcast(buffer.const_data_ptr(), buffer.mutable_data_ptr(), buffer.nbytes(), ncclUint8, root,
                         comm, stream);
  });
  return transfer;
}

c10::Device DeviceCommunicator::device() const {
  return state_->device;
}

const Communicator& DeviceCommunicator::ranks() const {
  return *state_->comm;
}

c10::Device select_device(const std::string& requested, const Communicator& node) {
  if (requested == "cpu") return c10::kCPU;
  if (requested != "auto" && requested != "cuda") {
    fail<ConfigError>("unknown device '{}': expected auto, cpu or cuda", requested);
  }
  const int n_devices = c10::cuda::device_count();
  if (n_devices > 0) {
    ISOBATH_CHECK(at::hasCUDA(),
                  "this build sees {} CUDA devices but has no operations for them: link libtorch_cuda",
                  n_devices);
    return {c10::kCUDA, static_cast<c10::DeviceIndex>(node.rank() % n_devices)};
  }
  if (requested == "auto") return c10::kCPU;
  fail<ConfigError>(
      "device 'cuda' was requested, but {} shows no CUDA device: use 'cpu' or 'auto', or check the driver "
      "and CUDA_VISIBLE_DEVICES",
      node.host());
}

int64_t device_memory_bytes(c10::Device device) {
  if (!device.is_cuda()) return 0;
  const c10::cuda::CUDAGuard guard(device);
  size_t free = 0, total = 0;
  ISOBATH_CUDA(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(total);
}

int64_t device_peak_bytes(c10::Device device) {
  if (!device.is_cuda()) return 0;
  constexpr size_t kAllPools = 0;
  return c10::cuda::CUDACachingAllocator::getDeviceStats(device.index()).allocated_bytes[kAllPools].peak;
}

std::string device_identity(c10::Device device) {
  if (!device.is_cuda()) return {};
  cudaDeviceProp properties{};
  ISOBATH_CUDA(cudaGetDeviceProperties(&properties, device.index()));
  std::string hex;
  for (const char byte : properties.uuid.bytes)
    hex += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return hex;
}

const char* device_backend_name() {
  return "nccl";
}

}  // namespace isobath::comm
