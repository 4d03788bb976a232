#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace isobath::plan {

/// A machine to plan for: what one rank computes with, and what ranks share. Rates are peaks as a vendor
/// states them, or measured ones (`isobath plan --calibrate`); `efficiency` lowers them to what code reaches.
struct Cluster {
  std::string name;
  int64_t nodes = 1;
  int64_t ranks_per_node = 1;
  std::string device = "cpu";  ///< cpu: ranks compute on the host; cuda: one device a rank
  struct Memory {
    double node_gib = 0;    ///< host memory of a node
    double device_gib = 0;  ///< memory of one rank's device; only with cuda
  } memory;
  /// Of one rank's device (of its share of the host with device: cpu).
  struct Compute {
    double bf16_tflops = 0;        ///< matrix product, bf16
    double f32_tflops = 0;         ///< matrix product, f32
    double covariance_tflops = 0;  ///< kernels::add_gram, packing included; 0: no kernels
    double attention_tflops = 0;   ///< counting causal pairs only
    double memory_gbs = 0;         ///< GB/s read + written by elementwise operations
    double operation_us = 0;       ///< to start one operation
    double host_link_gbs = 0;      ///< device to host and back; only with cuda
  } compute;
  /// Of one rank's share of the host, where H is factorized and codes are chosen.
  struct Host {
    double threads = 1;
    double f64_factor_tflops = 0;  ///< Cholesky and triangular solve
    double f64_gemm_tflops = 0;    ///< matrix product (asymmetric correction)
    double f32_thin_tflops = 0;    ///< product with 64 columns (GPTQ's lazy update, sweeps, objectives)
    double column_gflops = 0;      ///< GPTQ's column loop, one thread
    double candidate_gps = 0;      ///< 1e9 (weight, candidate grid) pairs a second, one thread (clip search)
    double pack_gps = 0;           ///< 1e9 codes packed or unpacked a second, one thread
    double memory_gbs = 0;
  } host;
  /// Of one rank's device, where rows are solved and wide H factorized; only with cuda.
  struct Rows {
    double f64_factor_tflops = 0;  ///< triangular solve
    double f64_gemm_tflops = 0;
    double product_tflops = 0;     ///< kernels::add_device_product, f32
    double column_us = 0;          ///< a column of the column loop beyond its products, all rows together
    double refined_column_us = 0;  ///< the same of a sweep of refinement
    double candidate_gps = 0;      ///< 1e9 (weight, candidate grid) pairs a second of the clip search
  } rows;
  /// GB/s that each rank reaches when all ranks send at once.
  struct Network {
    double within_node_gbs = 0, between_nodes_gbs = 0;                ///< host memory (MPI)
    double device_within_node_gbs = 0, device_between_nodes_gbs = 0;  ///< device memory (NCCL); cpu: as above
    double latency_us = 0;
  } network;
  /// Of the shared file system, for the whole job and for one node.
  struct Filesystem {
    double read_gbs = 0, write_gbs = 0, node_read_gbs = 0, node_write_gbs = 0;
  } filesystem;
  /// Share of a stated rate that code reaches; 1 for measured rates.
  struct Efficiency {
    double gemm = 1, f32_gemm = 1, covariance = 1, attention = 1, memory = 1, host = 1, network = 1,
           filesystem = 1;
  } efficiency;

  [[nodiscard]] bool has_devices() const { return device == "cuda"; }
  /// The faster dtype of products: what `compute_dtype: auto` takes for bf16 checkpoints.
  [[nodiscard]] bool prefers_bf16() const {
    return compute.bf16_tflops * efficiency.gemm > compute.f32_tflops * efficiency.f32_gemm;
  }
  /// Whether sums of H are made by kernels::add_gram in the preferred dtype.
  [[nodiscard]] bool has_gram() const { return compute.covariance_tflops > 0; }
  /// Whether all kernels of src/kernels run in the preferred dtype; elsewhere ATen's operations stand for
  /// them.
  [[nodiscard]] bool has_kernels() const { return !has_devices() && has_gram(); }
  [[nodiscard]] int64_t n_ranks() const { return nodes * ranks_per_node; }
};

/// The cluster with `n_ranks` of its kind: as many nodes as they need, the last one maybe not full.
[[nodiscard]] Cluster with_ranks(Cluster cluster, int64_t n_ranks);

/// Parses a cluster description. Strict as config::parse: an unknown key (with the nearest known one), a
/// missing required key, a wrong type or a value that is not positive is a ConfigError naming source and
/// line; all problems are listed at once.
[[nodiscard]] Cluster parse_cluster(const std::string& yaml, const std::string& source);

/// YAML that `parse_cluster` reads back, every key with its unit in a comment; `comment` stands on top.
[[nodiscard]] std::string cluster_yaml(const Cluster& cluster, const std::string& comment);

/// Every key with unit and meaning as Markdown, for docs.
[[nodiscard]] std::string cluster_keys_markdown();

}  // namespace isobath::plan
