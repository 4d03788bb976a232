#pragma once
#include <cstdint>
#include <isobath/core/partition.hpp>
#include <vector>

namespace isobath::data {

/// A fixed group of sequences that travels through the pipeline together. Its shape depends on the
/// configuration only, never on the number of ranks.
struct Microbatch {
  int64_t index;    ///< position in the global order
  int64_t shard;    ///< logical shard it belongs to
  Range sequences;  ///< global sequence indices; at most `microbatch` of them, never across a shard border
};

/// Deals sequences to logical shards by index and cuts each shard into microbatches (ARCHITECTURE §5).
///
///   10 sequences, 4 shards, microbatch 2: shards [0,3) [3,6) [6,8) [8,10); microbatches {0,1}{2} {3,4}{5}
///   {6,7} {8,9}
class ShardPlan {
 public:
  /// n_shards is lowered to n_sequences when larger.
  ShardPlan(int64_t n_sequences, int64_t n_shards, int64_t microbatch);

  [[nodiscard]] int64_t n_shards() const;
  [[nodiscard]] int64_t n_sequences() const;
  [[nodiscard]] const std::vector<Microbatch>& microbatches() const;
  /// Logical shards of holder `part` of `n_parts`: contiguous.
  [[nodiscard]] Range shards_of(int64_t part, int64_t n_parts) const;
  /// Microbatches of those shards, in order.
  [[nodiscard]] std::vector<Microbatch> microbatches_of(int64_t part, int64_t n_parts) const;
  /// Those of `some` (whole microbatches of this plan) that are in these shards, in their order.
  [[nodiscard]] std::vector<Microbatch> held_among(const std::vector<Microbatch>& some, int64_t part,
                                                   int64_t n_parts) const;
  /// Sequences of those shards: contiguous.
  [[nodiscard]] Range sequences_of(int64_t part, int64_t n_parts) const;
  [[nodiscard]] Range sequences_of_shard(int64_t shard) const;
  /// owners()[s] = holder of shard s, as TreeSum wants it.
  [[nodiscard]] std::vector<int> owners(int64_t n_parts) const;

 private:
  int64_t n_sequences_, n_shards_;
  std::vector<Microbatch> microbatches_;
};

}  // namespace isobath::data
