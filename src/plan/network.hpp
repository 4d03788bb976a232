#pragma once
#include <isobath/plan/job.hpp>

/// Time of transfers: bytes over the slowest link on the way, and latency.
namespace isobath::plan {

enum class Buffers { host, device };

/// GB/s between ranks of one node, or of two.
[[nodiscard]] double bytes_per_s(const Cluster& cluster, Buffers buffers, bool between_nodes);

/// One message.
[[nodiscard]] double message_s(const Cluster& cluster, Buffers buffers, bool between_nodes, double bytes);

/// From one rank to all: on the host a scatter and an all-gather, 2 (N−1)/N bytes a rank; on devices a
/// pipelined ring, (N−1)/N bytes.
[[nodiscard]] double broadcast_s(const Job& job, Buffers buffers, double bytes);

/// MPI_Allreduce of `bytes` on the host: ring, 2 (N−1)/N bytes a rank.
[[nodiscard]] double all_reduce_s(const Job& job, double bytes);

/// TreeSum of one f32 matrix: ⌈log₂ holders⌉ messages on the critical path, each added once; one more message
/// when the root is not rank 0.
[[nodiscard]] double tree_sum_s(const Job& job, double bytes, bool moves_to_root);

/// Whether the neighbours of a pipeline stage sit on two nodes for some replica.
[[nodiscard]] bool pipeline_crosses_nodes(const Job& job, int stage);

/// Whether the replicas of a stage sit on more than one node.
[[nodiscard]] bool replicas_cross_nodes(const Job& job);

/// Seconds to read or write `bytes` from `nodes` nodes at once.
[[nodiscard]] double read_s(const Cluster& cluster, double bytes, int64_t nodes);
[[nodiscard]] double write_s(const Cluster& cluster, double bytes, int64_t nodes);

}  // namespace isobath::plan
