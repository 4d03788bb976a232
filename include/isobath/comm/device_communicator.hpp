#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <isobath/comm/communicator.hpp>
#include <memory>
#include <string>

namespace isobath::comm {

/// Tensor transfer where the tensors live: one header, two sources chosen by CMake. `host` stages device
/// tensors through MPI; `nccl` hands CUDA tensors to NCCL (and CPU tensors to MPI). NCCL refuses two ranks on
/// one device: where any two share one, `nccl` stages like `host`. Same order of calls on every rank.
class DeviceCommunicator {
 public:
  /// Collective over `comm`, which must outlive this object.
  DeviceCommunicator(const Communicator& comm, c10::Device device);
  ~DeviceCommunicator();
  DeviceCommunicator(DeviceCommunicator&&) noexcept;
  DeviceCommunicator& operator=(DeviceCommunicator&&) noexcept;

  /// A transfer under way; `wait` before the tensor is used (receive, broadcast) or changed (send).
  class Transfer {
   public:
    Transfer();
    ~Transfer();
    Transfer(Transfer&&) noexcept;
    Transfer& operator=(Transfer&&) noexcept;
    void wait();
    struct State;

   private:
    friend class DeviceCommunicator;
    std::unique_ptr<State> state_;
  };

  [[nodiscard]] Transfer send_async(const at::Tensor& tensor, int destination, int tag) const;
  [[nodiscard]] Transfer receive_async(at::Tensor& tensor, int source, int tag) const;
  /// Started at the same place among the collective calls of every rank.
  [[nodiscard]] Transfer broadcast_async(at::Tensor& tensor, int root) const;
  void broadcast(at::Tensor& tensor, int root) const { broadcast_async(tensor, root).wait(); }
  [[nodiscard]] c10::Device device() const;
  /// The ranks that these are transfers of.
  [[nodiscard]] const Communicator& ranks() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// The device of this rank: CPU in a host build; in a CUDA build CUDA device `node.rank() % device_count`
/// unless `requested` is "cpu". requested: "auto" | "cpu" | "cuda". Throws ConfigError when "cuda" cannot be
/// had.
[[nodiscard]] c10::Device select_device(const std::string& requested, const Communicator& node);

/// Memory of a CUDA device, bytes; 0 for the CPU.
[[nodiscard]] int64_t device_memory_bytes(c10::Device device);

/// The most that this process's tensors took of a CUDA device at once so far, bytes; 0 for the CPU.
[[nodiscard]] int64_t device_peak_bytes(c10::Device device);

/// Tells one CUDA device from all others of all hosts (its UUID, 32 hex digits); empty for the CPU.
[[nodiscard]] std::string device_identity(c10::Device device);

/// "host" or "nccl".
[[nodiscard]] const char* device_backend_name();

}  // namespace isobath::comm
