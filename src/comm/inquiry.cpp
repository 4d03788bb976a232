#include "inquiry.hpp"

#include <fmt/format.h>

#include <utility>

namespace isobath::comm {
namespace {

constexpr int kQuestion = 1, kAnswer = 2;
constexpr int kNamed = 4;

}  // namespace

Inquiry::Inquiry(MPI_Comm own, std::vector<std::string> hosts) : own_(own), hosts_(std::move(hosts)) {
  ISOBATH_MPI(MPI_Comm_set_errhandler(own_, MPI_ERRORS_RETURN));
  ISOBATH_MPI(MPI_Comm_rank(own_, &rank_));
}

Inquiry::~Inquiry() {
  // So small that MPI has taken them; what it has not, it may still read.
  for (Sent& sent : sent_) static_cast<void>(MPI_Request_free(&sent.request));
  if (!sent_.empty()) static_cast<void>(new std::list<Sent>(std::move(sent_)));
  MPI_Comm_free(&own_);
}

void Inquiry::send(int rank, int tag, const Message& message) {
  Sent& sent = sent_.emplace_back(Sent{message, MPI_REQUEST_NULL});
  static_cast<void>(MPI_Isend(&sent.message, sizeof(Message), MPI_BYTE, rank, tag, own_, &sent.request));
}

void Inquiry::serve(const Sign& self) {
  for (;;) {
    int found = 0;
    MPI_Status status;
    if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, own_, &found, &status) != MPI_SUCCESS || found == 0) break;
    Message message{};
    if (MPI_Recv(&message, sizeof(Message), MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, own_,
                 MPI_STATUS_IGNORE) != MPI_SUCCESS)
      break;
    if (status.MPI_TAG == kQuestion) {
      send(status.MPI_SOURCE, kAnswer, {message.number, self});
    } else if (message.number == number_) {
      answers_[status.MPI_SOURCE] = message.sign;
    }
  }
  sent_.remove_if([](Sent& sent) {
    int done = 0;
    return MPI_Test(&sent.request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done != 0;
  });
}

void Inquiry::ask() {
  ++number_;
  answers_.clear();
  for (int rank = 0; rank < n_ranks(); ++rank)
    if (rank != rank_) send(rank, kQuestion, {number_, {}});
}

std::string Inquiry::silent_ranks() const {
  std::string text;
  int n_silent = 0;
  for (int rank = 0; rank < n_ranks(); ++rank) {
    if (rank == rank_ || answers_.contains(rank)) continue;
    if (++n_silent <= kNamed) text += (text.empty() ? "" : ", ") + name_of(rank);
  }
  if (n_silent > kNamed) text += fmt::format(" and {} more", n_silent - kNamed);
  return text;
}

std::string Inquiry::name_of(int rank) const {
  return fmt::format("rank {} ({})", rank, hosts_[static_cast<size_t>(rank)]);
}

}  // namespace isobath::comm
