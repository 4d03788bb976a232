#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <isobath/core/error.hpp>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace isobath::comm {

/// Order-independent combinations only: sums of floating-point results go through TreeSum, whose order is
/// fixed.
enum class Reduce { sum, min, max };

template <class T>
concept Countable = std::is_same_v<T, int32_t> || std::is_same_v<T, int64_t> || std::is_same_v<T, uint64_t> ||
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, uint8_t>;

/// A transfer under way. Keeps its tensor alive; `wait` polls with back-off, so that oversubscribed ranks
/// yield the core.
class Request {
 public:
  Request();
  ~Request();  // never communicates; a request dropped while unwinding is abandoned
  Request(Request&&) noexcept;
  Request& operator=(Request&&) noexcept;
  [[nodiscard]] bool active() const;
  [[nodiscard]] bool test();
  void wait();

  struct State;

 private:
  friend class Communicator;
  std::unique_ptr<State> state_;
};

/// A group of ranks with private tags and error handler. Move-only and owning.
class Communicator {
 public:
  struct State;
  explicit Communicator(std::unique_ptr<State> state);
  ~Communicator();
  Communicator(Communicator&&) noexcept;
  Communicator& operator=(Communicator&&) noexcept;

  [[nodiscard]] int rank() const;
  [[nodiscard]] int size() const;
  /// Host name of this rank, for messages.
  [[nodiscard]] const std::string& host() const;

  /// Collective over this communicator.
  [[nodiscard]] Communicator duplicate() const;
  /// Collective: ranks of equal color, ordered by key.
  [[nodiscard]] Communicator split(int color, int key) const;
  /// Collective: the ranks that share this rank's memory.
  [[nodiscard]] Communicator node() const;

  /// Largest number of bytes handed to one MPI call; longer transfers are cut into several. The same on every
  /// rank, inherited by duplicate, split and node. Lowered only by tests.
  void set_message_limit(int64_t limit_bytes);

  void barrier() const;

  template <Countable T>
  void broadcast(std::span<T> values, int root) const;
  /// In place; contiguous CPU tensor of the same dtype and shape on every rank. Any size.
  void broadcast(at::Tensor& tensor, int root) const;
  void broadcast(std::string& text, int root) const;

  /// The same, started: complete after `wait`; until then the tensor is not touched. Every rank starts it at
  /// the same place among its collective calls. It goes on whenever this rank waits for anything.
  [[nodiscard]] Request broadcast_async(at::Tensor& tensor, int root) const;

  template <Countable T>
  void all_reduce(std::span<T> values, Reduce operation) const;
  template <Countable T>
  [[nodiscard]] T all_reduce(T value, Reduce operation) const {
    all_reduce(std::span<T>(&value, 1), operation);
    return value;
  }
  /// One string per rank, in rank order, on every rank.
  [[nodiscard]] std::vector<std::string> all_gather(const std::string& text) const;

  /// Point to point, contiguous CPU tensors, any size. The receiver knows dtype and shape. tag in [0, 16000).
  [[nodiscard]] Request send_async(const at::Tensor& tensor, int destination, int tag) const;
  [[nodiscard]] Request receive_async(at::Tensor& tensor, int source, int tag) const;
  void send(const at::Tensor& tensor, int destination, int tag) const;
  void receive(at::Tensor& tensor, int source, int tag) const;

  /// Collective: raises AgreedFailure on *every* rank when any rank passes a non-empty text; the message
  /// lists each failing rank ("rank 3 (host): …", equal texts merged) and the code is the largest of the
  /// failing ranks'.
  void agree(const std::string& failure, ExitCode code) const;
  /// Collective: runs `action` on every rank and agrees on its outcome: an Error thrown on any rank becomes
  /// the same AgreedFailure on all. `action` must not communicate over this communicator.
  void agree_on(const std::function<void()>& action) const;
  /// Collective: whether any rank says true.
  [[nodiscard]] bool any(bool value) const;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace isobath::comm
