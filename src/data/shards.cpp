#include <isobath/data/shards.hpp>

#include <algorithm>
#include <isobath/core/error.hpp>

namespace isobath::data {

ShardPlan::ShardPlan(int64_t n_sequences, int64_t n_shards, int64_t microbatch)
    : n_sequences_(n_sequences), n_shards_(std::min(n_shards, n_sequences)) {
  ISOBATH_CHECK(n_sequences > 0 && n_shards > 0 && microbatch > 0, "ShardPlan({}, {}, {})", n_sequences,
                n_shards, microbatch);
  for (int64_t shard = 0; shard < n_shards_; ++shard) {
    const Range sequences = sequences_of_shard(shard);
    for (int64_t begin = sequences.begin; begin < sequences.end; begin += microbatch) {
      microbatches_.push_back({.index = static_cast<int64_t>(microbatches_.size()),
                               .shard = shard,
                               .sequences = {begin, std::min(begin + microbatch, sequences.end)}});
    }
  }
}

int64_t ShardPlan::n_shards() const {
  return n_shards_;
}
int64_t ShardPlan::n_sequences() const {
  return n_sequences_;
}
const std::vector<Microbatch>& ShardPlan::microbatches() const {
  return microbatches_;
}

Range ShardPlan::shards_of(int64_t part, int64_t n_parts) const {
  return partition(n_shards_, n_parts, part);
}

std::vector<Microbatch> ShardPlan::microbatches_of(int64_t part, int64_t n_parts) const {
  return held_among(microbatches_, part, n_parts);
}

std::vector<Microbatch> ShardPlan::held_among(const std::vector<Microbatch>& some, int64_t part,
                                              int64_t n_parts) const {
  const Range shards = shards_of(part, n_parts);
  std::vector<Microbatch> held;
  std::copy_if(some.begin(), some.end(), std::back_inserter(held),
               [&](const Microbatch& microbatch) { return shards.contains(microbatch.shard); });
  return held;
}

Range ShardPlan::sequences_of(int64_t part, int64_t n_parts) const {
  const Range shards = shards_of(part, n_parts);
  const auto begin_of = [&](int64_t shard) {
    return shard == n_shards_ ? n_sequences_ : sequences_of_shard(shard).begin;
  };
  return {begin_of(shards.begin), begin_of(shards.end)};
}

Range ShardPlan::sequences_of_shard(int64_t shard) const {
  return partition(n_sequences_, n_shards_, shard);
}

std::vector<int> ShardPlan::owners(int64_t n_parts) const {
  std::vector<int> owners(static_cast<size_t>(n_shards_));
  for (int64_t shard = 0; shard < n_shards_; ++shard)
    owners[static_cast<size_t>(shard)] = static_cast<int>(owner_of(shard, n_shards_, n_parts));
  return owners;
}

}  // namespace isobath::data
