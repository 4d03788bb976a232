#include <isobath/comm/communicator.hpp>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <exception>

#include "communicator_state.hpp"
#include "polling.hpp"

namespace isobath::comm {
namespace {

template <Countable T>
MPI_Datatype datatype() {
  if constexpr (std::is_same_v<T, int32_t>) return MPI_INT32_T;
  if constexpr (std::is_same_v<T, int64_t>) return MPI_INT64_T;
  if constexpr (std::is_same_v<T, uint64_t>) return MPI_UINT64_T;
  if constexpr (std::is_same_v<T, float>) return MPI_FLOAT;
  if constexpr (std::is_same_v<T, double>) return MPI_DOUBLE;
  if constexpr (std::is_same_v<T, uint8_t>) return MPI_UINT8_T;
}

MPI_Op mpi_operation(Reduce operation) {
  switch (operation) {
    case Reduce::sum:
      return MPI_SUM;
    case Reduce::min:
      return MPI_MIN;
    case Reduce::max:
      return MPI_MAX;
  }
  ISOBATH_CHECK(false, "unknown reduction {}", static_cast<int>(operation));
}

/// Calls transfer(begin, count) for consecutive pieces of at most `limit` items.
template <class Transfer>
void in_pieces(int64_t n_items, int64_t limit, Transfer&& transfer) {
  for (int64_t begin = 0; begin < n_items; begin += limit) {
    transfer(begin, static_cast<int>(std::min(limit, n_items - begin)));
  }
}

void broadcast_bytes(const Communicator::State& state, void* bytes, int64_t n_bytes, int root) {
  in_pieces(n_bytes, state.message_limit, [&](int64_t begin, int count) {
    MPI_Request request = MPI_REQUEST_NULL;
    ISOBATH_MPI(MPI_Ibcast(static_cast<char*>(bytes) + begin, count, MPI_BYTE, root, state.handle, &request));
    wait_for(request, "broadcast");
  });
}

}  // namespace

Communicator::State::State(MPI_Comm handle, int64_t message_limit)
    : handle(handle), message_limit(message_limit) {
  ISOBATH_MPI(MPI_Comm_set_errhandler(handle, MPI_ERRORS_RETURN));
  ISOBATH_MPI(MPI_Comm_rank(handle, &rank));
  ISOBATH_MPI(MPI_Comm_size(handle, &size));
  char name[MPI_MAX_PROCESSOR_NAME];
  int length = 0;
  ISOBATH_MPI(MPI_Get_processor_name(name, &length));
  host.assign(name, static_cast<size_t>(length));
}

Communicator::State::~State() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  // MPI_Comm_free is collective: the other ranks may not be unwinding.
  if (finalized || std::uncaught_exceptions() > 0) return;
  MPI_Comm_free(&handle);
}

Communicator::Communicator(std::unique_ptr<State> state) : state_(std::move(state)) {}
Communicator::~Communicator() = default;
Communicator::Communicator(Communicator&&) noexcept = default;
Communicator& Communicator::operator=(Communicator&&) noexcept = default;

int Communicator::rank() const {
  return state_->rank;
}
int Communicator::size() const {
  return state_->size;
}
const std::string& Communicator::host() const {
  return state_->host;
}

void Communicator::set_message_limit(int64_t limit_bytes) {
  ISOBATH_CHECK(0 < limit_bytes && limit_bytes <= kDefaultMessageLimit, "message limit of {} bytes",
                limit_bytes);
  state_->message_limit = limit_bytes;
}

// The three below have no non-blocking form that 4.1 progresses well; the barrier takes the long part of the
// wait.
Communicator Communicator::duplicate() const {
  barrier();
  const Watchdog::Guard guard("duplicate of a communicator");
  MPI_Comm handle = MPI_COMM_NULL;
  ISOBATH_MPI(MPI_Comm_dup(state_->handle, &handle));
  return Communicator(std::make_unique<State>(handle, state_->message_limit));
}

Communicator Communicator::split(int color, int key) const {
  ISOBATH_CHECK(color >= 0, "color {}", color);
  barrier();
  const Watchdog::Guard guard("split of a communicator");
  MPI_Comm handle = MPI_COMM_NULL;
  ISOBATH_MPI(MPI_Comm_split(state_->handle, color, key, &handle));
  return Communicator(std::make_unique<State>(handle, state_->message_limit));
}

Communicator Communicator::node() const {
  barrier();
  const Watchdog::Guard guard("split of a communicator by node");
  MPI_Comm handle = MPI_COMM_NULL;
  ISOBATH_MPI(
      MPI_Comm_split_type(state_->handle, MPI_COMM_TYPE_SHARED, state_->rank, MPI_INFO_NULL, &handle));
  return Communicator(std::make_unique<State>(handle, state_->message_limit));
}

void Communicator::barrier() const {
  MPI_Request request = MPI_REQUEST_NULL;
  ISOBATH_MPI(MPI_Ibarrier(state_->handle, &request));
  wait_for(request, "barrier");
}

template <Countable T>
void Communicator::broadcast(std::span<T> values, int root) const {
  broadcast_bytes(*state_, values.data(), static_cast<int64_t>(values.size_bytes()), root);
}

void Communicator::broadcast(at::Tensor& tensor, int root) const {
  ISOBATH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "broadcast takes contiguous CPU tensors");
  broadcast_bytes(*state_, tensor.data_ptr(), static_cast<int64_t>(tensor.nbytes()), root);
}

void Communicator::broadcast(std::string& text, int root) const {
  auto n_bytes = static_cast<int64_t>(text.size());
  broadcast(std::span(&n_bytes, 1), root);
  text.resize(static_cast<size_t>(n_bytes));
  broadcast_bytes(*state_, text.data(), n_bytes, root);
}

template <Countable T>
void Communicator::all_reduce(std::span<T> values, Reduce operation) const {
  ISOBATH_CHECK(!(std::is_floating_point_v<T> && operation == Reduce::sum),
                "a floating-point sum depends on the order of the ranks: use TreeSum");
  const int64_t limit = std::max<int64_t>(1, state_->message_limit / static_cast<int64_t>(sizeof(T)));
  in_pieces(static_cast<int64_t>(values.size()), limit, [&](int64_t begin, int count) {
    MPI_Request request = MPI_REQUEST_NULL;
    ISOBATH_MPI(MPI_Iallreduce(MPI_IN_PLACE, values.data() + begin, count, datatype<T>(),
                               mpi_operation(operation), state_->handle, &request));
    wait_for(request, "all_reduce");
  });
}

std::vector<std::string> Communicator::all_gather(const std::string& text) const {
  const auto n_ranks = static_cast<size_t>(size());
  std::vector<int64_t> lengths(n_ranks);
  const auto length = static_cast<int64_t>(text.size());
  MPI_Request request = MPI_REQUEST_NULL;
  ISOBATH_MPI(
      MPI_Iallgather(&length, 1, MPI_INT64_T, lengths.data(), 1, MPI_INT64_T, state_->handle, &request));
  wait_for(request, "all_gather");

  std::vector<std::string> texts(n_ranks);
  std::vector<int> counts(n_ranks), offsets(n_ranks);
  int64_t total = 0;
  for (const int64_t n : lengths) total += n;
  if (total > state_->message_limit) {
    for (int root = 0; root < size(); ++root) {
      std::string& piece = texts[static_cast<size_t>(root)];
      if (root == rank()) piece = text;
      broadcast(piece, root);
    }
    return texts;
  }
  int offset = 0;
  for (size_t r = 0; r < n_ranks; ++r) {
    counts[r] = static_cast<int>(lengths[r]);
    offsets[r] = offset;
    offset += counts[r];
  }
  std::string all(static_cast<size_t>(total), '\0');
  ISOBATH_MPI(MPI_Iallgatherv(text.data(), static_cast<int>(length), MPI_BYTE, all.data(), counts.data(),
                              offsets.data(), MPI_BYTE, state_->handle, &request));
  wait_for(request, "all_gather");
  for (size_t r = 0; r < n_ranks; ++r) {
    texts[r] = all.substr(static_cast<size_t>(offsets[r]), static_cast<size_t>(counts[r]));
  }
  return texts;
}

#define ISOBATH_INSTANTIATE(T)                                       \
  template void Communicator::broadcast<T>(std::span<T>, int) const; \
  template void Communicator::all_reduce<T>(std::span<T>, Reduce) const;
ISOBATH_INSTANTIATE(int32_t)
ISOBATH_INSTANTIATE(int64_t)
ISOBATH_INSTANTIATE(uint64_t)
ISOBATH_INSTANTIATE(float)
ISOBATH_INSTANTIATE(double)
ISOBATH_INSTANTIATE(uint8_t)
#undef ISOBATH_INSTANTIATE

}  // namespace isobath::comm
