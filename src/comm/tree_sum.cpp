#include <isobath/comm/tree_sum.hpp>

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

namespace isobath::comm {
namespace {

constexpr int64_t kMaxDimensions = 8;

at::Tensor combine(at::Tensor left, const at::Tensor& right, Reduce operation) {
  switch (operation) {
    case Reduce::sum:
      return left.add_(right);
    case Reduce::min:
      return at::minimum_out(left, left, right);
    case Reduce::max:
      return at::maximum_out(left, left, right);
  }
  ISOBATH_CHECK(false, "unknown reduction {}", static_cast<int>(operation));
}

/// dtype, number of dimensions, sizes: a root that owns no shard knows none of them.
at::Tensor encode_shape(const at::Tensor& tensor) {
  ISOBATH_CHECK(tensor.dim() <= kMaxDimensions, "{} dimensions, at most {}", tensor.dim(), kMaxDimensions);
  at::Tensor header = at::zeros({2 + kMaxDimensions}, at::kLong);
  auto* values = header.mutable_data_ptr<int64_t>();
  values[0] = static_cast<int64_t>(tensor.scalar_type());
  values[1] = tensor.dim();
  std::copy(tensor.sizes().begin(), tensor.sizes().end(), values + 2);
  return header;
}

at::Tensor empty_from(const at::Tensor& header) {
  const auto* values = header.const_data_ptr<int64_t>();
  return at::empty(at::IntArrayRef(values + 2, static_cast<size_t>(values[1])),
                   at::TensorOptions(static_cast<at::ScalarType>(values[0])));
}

}  // namespace

TreeSum::TreeSum(std::vector<int> owners, int rank, Reduce operation)
    : owners_(std::move(owners)), rank_(rank), operation_(operation), added_(owners_.size(), false) {
  ISOBATH_CHECK(!owners_.empty(), "a sum over no shards");
  ISOBATH_CHECK(std::is_sorted(owners_.begin(), owners_.end()),
                "owners of shards must be contiguous and ascending");
}

bool TreeSum::exists(Node node) const {
  return (node.index << node.level) < static_cast<int64_t>(owners_.size());
}

int TreeSum::holder(Node node, int root) const {
  const std::span owners = std::span(owners_).subspan(static_cast<size_t>(node.index << node.level));
  const auto n = std::min<std::ptrdiff_t>(std::ssize(owners), std::ptrdiff_t{1} << node.level);
  return std::binary_search(owners.begin(), owners.begin() + n, root) ? root : owners.front();
}

void TreeSum::add(int64_t shard, at::Tensor total) {
  ISOBATH_CHECK(0 <= shard && shard < static_cast<int64_t>(owners_.size()), "shard {} of {}", shard,
                owners_.size());
  const int owner = owners_[static_cast<size_t>(shard)];
  ISOBATH_CHECK(owner == rank_, "shard {} belongs to rank {}, added by rank {}", shard, owner, rank_);
  ISOBATH_CHECK(!added_[static_cast<size_t>(shard)], "shard {} was added before", shard);
  ISOBATH_CHECK(total.defined() && total.is_contiguous(), "shard totals are contiguous tensors");
  if (!partial_.empty()) {
    const at::Tensor& other = partial_.begin()->second;
    ISOBATH_CHECK(total.sizes() == other.sizes() && total.scalar_type() == other.scalar_type() &&
                      total.device() == other.device(),
                  "shard {} differs in shape, dtype or device from the shards before it", shard);
  }
  added_[static_cast<size_t>(shard)] = true;
  partial_[{0, shard}] = std::move(total);
  combine_upwards({0, shard});
}

void TreeSum::combine_upwards(Node node) {
  while (node.index > 0 || (int64_t{1} << node.level) < static_cast<int64_t>(owners_.size())) {
    const Node left{node.level, node.index & ~int64_t{1}}, right{node.level, node.index | 1};
    const Node parent{node.level + 1, node.index / 2};
    if (!partial_.contains(left) || (exists(right) && !partial_.contains(right))) return;
    at::Tensor sum = std::move(partial_.extract(left).mapped());
    if (exists(right)) sum = combine(std::move(sum), partial_.extract(right).mapped(), operation_);
    partial_[parent] = std::move(sum);
    node = parent;
  }
}

at::Tensor TreeSum::reduce_to(int root, const Communicator& comm, int tag) {
  ISOBATH_CHECK(comm.rank() == rank_, "rank {} of the communicator, {} of the tree", comm.rank(), rank_);
  ISOBATH_CHECK(owners_.front() >= 0 && owners_.back() < comm.size(), "owner {} of {} ranks", owners_.back(),
                comm.size());
  const auto n_shards = static_cast<int64_t>(owners_.size());
  for (size_t s = 0; s < owners_.size(); ++s) {
    ISOBATH_CHECK(owners_[s] != rank_ || added_[s], "shard {} was never added", s);
  }

  for (auto& [node, sum] : partial_) sum = sum.cpu();
  // Owners ascend, so two ranks meet at most once per level, and tag + level is unambiguous.
  std::vector<Request> sends;
  int level = 0;
  for (; (int64_t{1} << level) < n_shards; ++level) {
    for (int64_t index = 0; (index << level) < n_shards; index += 2) {
      const Node left{level, index}, right{level, index + 1};
      if (!exists(right)) continue;
      const int of_left = holder(left, root), of_right = holder(right, root);
      if (of_left == of_right || (of_left != rank_ && of_right != rank_)) continue;
      const Node own = of_left == rank_ ? left : right, other = of_left == rank_ ? right : left;
      const int peer = of_left == rank_ ? of_right : of_left;
      if (holder({level + 1, index / 2}, root) != rank_) {
        sends.push_back(comm.send_async(partial_.extract(own).mapped(), peer, tag + level));
      } else {
        at::Tensor received = at::empty_like(partial_.at(own));
        comm.receive(received, peer, tag + level);
        partial_[other] = std::move(received);
        combine_upwards(own);
      }
    }
  }
  at::Tensor total;
  const int holder_of_total = holder({level, 0}, root);
  if (rank_ == holder_of_total) total = partial_.extract({level, 0}).mapped();
  if (root != holder_of_total && rank_ == holder_of_total) {
    sends.push_back(comm.send_async(encode_shape(total), root, tag + level));
    sends.push_back(comm.send_async(total, root, tag + level + 1));
    total.reset();
  } else if (root != holder_of_total && rank_ == root) {
    at::Tensor header = at::empty({2 + kMaxDimensions}, at::kLong);
    comm.receive(header, holder_of_total, tag + level);
    total = empty_from(header);
    comm.receive(total, holder_of_total, tag + level + 1);
  }
  for (Request& send : sends) send.wait();
  added_.assign(owners_.size(), false);
  return total;
}

}  // namespace isobath::comm
