#pragma once
#include <isobath/plan/job.hpp>
#include <string>
#include <vector>

namespace isobath::plan {

/// Bytes that one rank holds at the peak of a stage of the run, by what they are for.
struct RankMemory {
  struct Item {
    std::string name;
    double device_bytes = 0;  ///< with device: cpu these stand on the host too
    double host_bytes = 0;
  };
  std::vector<Item> items;
  double root_bytes = 0;       ///< host, beyond the items, on a rank that factorizes
  double node_root_bytes = 0;  ///< the same of all ranks of one node that factorize at once

  [[nodiscard]] double device_bytes() const;
  [[nodiscard]] double host_bytes() const;
};

/// Of the rank at pipeline stage `stage`. The largest replica is meant.
///
/// measure   weights; one input for each block and microbatch in flight (1F1B: stages − stage), and what the
///           backward pass needs of as many blocks as ranks.activation_gib holds; the backward pass of one
///           block, or the logits of one chunk; D of its blocks; two messages a direction
///           (streamed: inputs of all blocks, on the host; gradients of all sequences; D and activations of
///           one block)
/// re-estimation  measure's, of the blocks that the first one still passes through; what quantize has between
///           two blocks: hidden states, the next block, codes being written; with loss kl the original's
///           last hidden states
/// quantize  weights; the block in work and its codes; hidden states of its share of the sequences, twice
///           with an asymmetric correction; then, while H of the modules of one input set is summed, sums and
///           partial sums, or, while they are solved, the H and factors (damped H, C, correction) of all
/// evaluate  the blocks of both models; two hidden states; the logits of one chunk
[[nodiscard]] RankMemory measure_memory(const Job& job, int stage);
[[nodiscard]] RankMemory reestimation_memory(const Job& job, int stage);
[[nodiscard]] RankMemory quantize_memory(const Job& job, int stage);
[[nodiscard]] RankMemory tune_memory(const Job& job, int stage);
[[nodiscard]] RankMemory evaluate_memory(const Job& job, int stage);

/// Inputs of a rank's blocks that a streamed measure keeps for its way back: zero where there is none.
struct BlockInputs {
  double memory_bytes = 0;
  double disk_bytes = 0;  ///< beyond scratch.memory_gib, in scratch.directory if that is set
};
[[nodiscard]] BlockInputs block_inputs(const Job& job, int stage);

/// What scratch.directory holds on the node that needs the most.
[[nodiscard]] double scratch_bytes(const Job& job);

/// The most that any stage of the run asks of one device and of one node.
struct MemoryNeed {
  double device_bytes = 0;
  double node_bytes = 0;  ///< ranks_per_node times the largest rank, and what those that factorize add
  std::string device_stage, node_stage;
};
[[nodiscard]] MemoryNeed memory_need(const Job& job);

/// What of a memory may be planned with; the rest is for fragmentation, page cache and the system.
inline constexpr double kUsableShare = 0.9;

/// Whether the need is at most kUsableShare of what the cluster has.
[[nodiscard]] bool fits(const MemoryNeed& need, const Cluster& cluster);

}  // namespace isobath::plan
