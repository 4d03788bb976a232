#include <ATen/core/Tensor.h>

#include <algorithm>
#include <exception>
#include <isobath/comm/communicator.hpp>
#include <isobath/core/log.hpp>
#include <vector>

#include "communicator_state.hpp"
#include "polling.hpp"
#include "progress.hpp"

namespace isobath::comm {

/// A message cut into pieces. MPI keeps the order of messages with one source, tag and communicator, so the
/// pieces need no numbers.
struct Request::State {
  struct Piece {
    MPI_Request request = MPI_REQUEST_NULL;
    int n_bytes = 0;
  };
  enum class Kind { send, receive, broadcast };
  State(at::Tensor moved, Kind what, int with, int message_tag)
      : tensor(std::move(moved)), kind(what), peer(with), tag(message_tag) {}
  at::Tensor tensor;
  std::vector<Piece> pieces;
  size_t n_done = 0;
  Kind kind;
  int peer;
  int tag;
  PendingTransfer pending;
};

namespace {

constexpr int kTagLimit = 16000;

void check_transfer(const at::Tensor& tensor, int peer, int tag, const Communicator& comm) {
  ISOBATH_CHECK(tensor.defined() && tensor.is_cpu() && tensor.is_contiguous(),
                "transfers take contiguous CPU tensors");
  ISOBATH_CHECK(0 <= peer && peer < comm.size(), "peer {} of {} ranks", peer, comm.size());
  ISOBATH_CHECK(0 <= tag && tag < kTagLimit, "tag {} outside [0, {})", tag, kTagLimit);
}

const char* name_of(Request::State::Kind kind) {
  switch (kind) {
    case Request::State::Kind::send:
      return "send";
    case Request::State::Kind::receive:
      return "receive";
    case Request::State::Kind::broadcast:
      return "broadcast";
  }
  return "";
}

/// Starts one piece after the other; an empty tensor is one empty message, so that it still orders the ranks.
template <class Start>
void start_pieces(Request::State& state, int64_t limit, Start&& start) {
  const auto n_bytes = static_cast<int64_t>(state.tensor.nbytes());
  const int64_t n_pieces = std::max<int64_t>(1, (n_bytes + limit - 1) / limit);
  state.pieces.resize(static_cast<size_t>(n_pieces));
  auto* bytes = static_cast<char*>(state.tensor.data_ptr());
  for (int64_t i = 0; i < n_pieces; ++i) {
    Request::State::Piece& piece = state.pieces[static_cast<size_t>(i)];
    piece.n_bytes = static_cast<int>(std::min(limit, n_bytes - i * limit));
    start(bytes + i * limit, piece);
  }
}

}  // namespace

Request::Request() = default;
Request::Request(Request&&) noexcept = default;

Request::~Request() {
  if (!state_) return;
  if (std::uncaught_exceptions() == 0) {
    log::warning("a {} with rank {} (tag {}) was dropped without wait()", name_of(state_->kind), state_->peer,
                 state_->tag);
  }
  // MPI may still write to or read from the tensor: it has to outlive this process's MPI.
  static_cast<void>(state_.release());
}

Request& Request::operator=(Request&& other) noexcept {
  Request old;
  old.state_ = std::exchange(state_, std::move(other.state_));
  return *this;
}

bool Request::active() const {
  return state_ != nullptr;
}

bool Request::test() {
  if (!state_) return true;
  for (; state_->n_done < state_->pieces.size(); ++state_->n_done) {
    State::Piece& piece = state_->pieces[state_->n_done];
    int done = 0;
    MPI_Status status;
    ISOBATH_MPI(MPI_Test(&piece.request, &done, &status));
    if (!done) return false;
    if (state_->kind != State::Kind::receive) continue;
    int n_received = 0;
    ISOBATH_MPI(MPI_Get_count(&status, MPI_BYTE, &n_received));
    ISOBATH_CHECK(n_received == piece.n_bytes,
                  "rank {} sent {} bytes with tag {}, {} were expected: shapes differ", state_->peer,
                  n_received, state_->tag, piece.n_bytes);
  }
  state_.reset();
  return true;
}

void Request::wait() {
  if (!state_) return;
  wait_until(name_of(state_->kind), [&] { return test(); });
}

Request Communicator::send_async(const at::Tensor& tensor, int destination, int tag) const {
  check_transfer(tensor, destination, tag, *this);
  Request request;
  request.state_ = std::make_unique<Request::State>(tensor, Request::State::Kind::send, destination, tag);
  start_pieces(*request.state_, state_->message_limit, [&](char* bytes, Request::State::Piece& piece) {
    ISOBATH_MPI(MPI_Isend(bytes, piece.n_bytes, MPI_BYTE, destination, tag, state_->handle, &piece.request));
  });
  return request;
}

Request Communicator::receive_async(at::Tensor& tensor, int source, int tag) const {
  check_transfer(tensor, source, tag, *this);
  Request request;
  request.state_ = std::make_unique<Request::State>(tensor, Request::State::Kind::receive, source, tag);
  start_pieces(*request.state_, state_->message_limit, [&](char* bytes, Request::State::Piece& piece) {
    ISOBATH_MPI(MPI_Irecv(bytes, piece.n_bytes, MPI_BYTE, source, tag, state_->handle, &piece.request));
  });
  return request;
}

Request Communicator::broadcast_async(at::Tensor& tensor, int root) const {
  check_transfer(tensor, root, 0, *this);
  Request request;
  request.state_ = std::make_unique<Request::State>(tensor, Request::State::Kind::broadcast, root, 0);
  start_pieces(*request.state_, state_->message_limit, [&](char* bytes, Request::State::Piece& piece) {
    ISOBATH_MPI(MPI_Ibcast(bytes, piece.n_bytes, MPI_BYTE, root, state_->handle, &piece.request));
  });
  return request;
}

void Communicator::send(const at::Tensor& tensor, int destination, int tag) const {
  send_async(tensor, destination, tag).wait();
}

void Communicator::receive(at::Tensor& tensor, int source, int tag) const {
  receive_async(tensor, source, tag).wait();
}

}  // namespace isobath::comm
