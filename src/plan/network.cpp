#include "network.hpp"

namespace isobath::plan {
namespace {

constexpr double kGiga = 1e9, kMicro = 1e-6;

double depth(int64_t n) {
  double levels = 0;
  while ((int64_t{1} << static_cast<int64_t>(levels)) < n) ++levels;
  return levels;
}

}  // namespace

double bytes_per_s(const Cluster& cluster, Buffers buffers, bool between_nodes) {
  const Cluster::Network& n = cluster.network;
  const double gbs = buffers == Buffers::host
                         ? (between_nodes ? n.between_nodes_gbs : n.within_node_gbs)
                         : (between_nodes ? n.device_between_nodes_gbs : n.device_within_node_gbs);
  return kGiga * gbs * cluster.efficiency.network;
}

double message_s(const Cluster& cluster, Buffers buffers, bool between_nodes, double bytes) {
  return bytes / bytes_per_s(cluster, buffers, between_nodes) + cluster.network.latency_us * kMicro;
}

double broadcast_s(const Job& job, Buffers buffers, double bytes) {
  const auto n = static_cast<double>(job.layout.n_ranks());
  if (n <= 1) return 0;
  // Without devices, what a rank computes with is host memory too.
  const double passes = buffers == Buffers::host || !job.cluster.has_devices() ? 2 : 1;
  return passes * (n - 1) / n * bytes / bytes_per_s(job.cluster, buffers, job.nodes() > 1) +
         depth(job.layout.n_ranks()) * job.cluster.network.latency_us * kMicro;
}

double all_reduce_s(const Job& job, double bytes) {
  const auto n = static_cast<double>(job.layout.n_ranks());
  if (n <= 1) return 0;
  return 2 * (n - 1) / n * bytes / bytes_per_s(job.cluster, Buffers::host, job.nodes() > 1) +
         2 * depth(job.layout.n_ranks()) * job.cluster.network.latency_us * kMicro;
}

double tree_sum_s(const Job& job, double bytes, bool moves_to_root) {
  const int64_t holders = std::min(job.layout.n_ranks(), job.layout.n_shards);
  if (job.layout.n_ranks() <= 1) return 0;
  const double add_s = 3 * bytes / (kGiga * job.cluster.host.memory_gbs * job.cluster.efficiency.memory);
  double total = 0;
  // On level l partners are about 2^l ranks apart.
  for (int64_t distance = 1; distance < holders; distance *= 2)
    total += message_s(job.cluster, Buffers::host, distance >= job.cluster.ranks_per_node, bytes) + add_s;
  if (moves_to_root) total += message_s(job.cluster, Buffers::host, false, bytes);
  return total;
}

bool pipeline_crosses_nodes(const Job& job, int stage) {
  if (stage + 1 >= job.layout.stages) return false;
  for (int64_t replica = 0; replica < job.layout.replicas; ++replica) {
    const int64_t rank = replica * job.layout.stages + stage;
    if (rank / job.cluster.ranks_per_node != (rank + 1) / job.cluster.ranks_per_node) return true;
  }
  return false;
}

bool replicas_cross_nodes(const Job& job) {
  return job.layout.replicas > 1 && job.nodes() > 1;
}

double read_s(const Cluster& cluster, double bytes, int64_t nodes) {
  const Cluster::Filesystem& f = cluster.filesystem;
  const double gbs = std::min(f.read_gbs, static_cast<double>(nodes) * f.node_read_gbs);
  return bytes / (kGiga * gbs * cluster.efficiency.filesystem);
}

double write_s(const Cluster& cluster, double bytes, int64_t nodes) {
  const Cluster::Filesystem& f = cluster.filesystem;
  const double gbs = std::min(f.write_gbs, static_cast<double>(nodes) * f.node_write_gbs);
  return bytes / (kGiga * gbs * cluster.efficiency.filesystem);
}

}  // namespace isobath::plan
