#include <gtest/gtest.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/plan/cluster.hpp>
#include <sstream>

namespace isobath::plan {
namespace {

std::string shipped(const std::string& name) {
  std::ifstream file(std::string(ISOBATH_SOURCE_ROOT) + "/configs/clusters/" + name + ".yaml");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string problem_of(const std::string& yaml) {
  try {
    (void)parse_cluster(yaml, "c.yaml");
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

/// The shipped description with `from` replaced.
std::string changed(const std::string& from, const std::string& to) {
  std::string text = shipped("cpu-cluster");
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

TEST(Cluster, ShippedDescriptionsAreRead) {
  const Cluster node = parse_cluster(shipped("h100-node"), "h100-node");
  EXPECT_TRUE(node.has_devices());
  EXPECT_EQ(node.n_ranks(), 8);
  EXPECT_EQ(node.memory.device_gib, 80);
  EXPECT_EQ(parse_cluster(shipped("h100-4-nodes"), "4").n_ranks(), 32);
  EXPECT_EQ(parse_cluster(shipped("h100-16-nodes"), "16").n_ranks(), 128);
  EXPECT_FALSE(parse_cluster(shipped("cpu-cluster"), "cpu").has_devices());
}

TEST(Cluster, WhatIsWrittenReadsBack) {
  for (const char* name : {"h100-node", "cpu-cluster"}) {
    const Cluster cluster = parse_cluster(shipped(name), name);
    const std::string yaml = cluster_yaml(cluster, "again");
    EXPECT_EQ(cluster_yaml(parse_cluster(yaml, "again"), "again"), yaml);
  }
}

TEST(Cluster, KernelsAreThoseOfACpuWithACovarianceRate) {
  Cluster cluster = parse_cluster(shipped("cpu-cluster"), "cpu");
  EXPECT_TRUE(cluster.has_kernels());
  cluster.device = "cuda";
  EXPECT_FALSE(cluster.has_kernels());
  cluster = parse_cluster(changed("  covariance_tflops: 14.7", "  #"), "cpu");
  EXPECT_FALSE(cluster.has_kernels());
  EXPECT_EQ(cluster_yaml(cluster, "c").find("covariance_tflops:"), std::string::npos);
}

TEST(Cluster, PrefersTheDtypeWhoseProductsAreFaster) {
  Cluster cluster = parse_cluster(shipped("cpu-cluster"), "cpu");
  EXPECT_TRUE(cluster.prefers_bf16());
  cluster.efficiency.gemm = 0.9 * cluster.compute.f32_tflops / cluster.compute.bf16_tflops;
  cluster.efficiency.f32_gemm = 1;
  EXPECT_FALSE(cluster.prefers_bf16());
}

TEST(Cluster, HostMessagesStandForDeviceMessagesWithoutDevices) {
  const Cluster cluster = parse_cluster(shipped("cpu-cluster"), "cpu");
  EXPECT_EQ(cluster.network.device_within_node_gbs, cluster.network.within_node_gbs);
  EXPECT_EQ(cluster.network.device_between_nodes_gbs, cluster.network.between_nodes_gbs);
}

TEST(Cluster, MistakesNameLineKeyAndWhatWasExpected) {
  EXPECT_NE(problem_of(changed("ranks_per_node:", "rank_per_node:")).find("did you mean \"ranks_per_node\"?"),
            std::string::npos);
  EXPECT_NE(problem_of(changed("latency_us:", "latency_use:")).find("unknown key \"network.latency_use\""),
            std::string::npos);
  EXPECT_NE(
      problem_of("nodes: 1\nranks_per_node: 2\ndevice: gpu\n").find("c.yaml:3: device: expected cpu or cuda"),
      std::string::npos);
  EXPECT_NE(
      problem_of("nodes: 0\n").find("c.yaml:1: nodes: expected a whole positive number (nodes), found \"0\""),
      std::string::npos);
  EXPECT_NE(problem_of("nodes: 1.5\n").find("found \"1.5\""), std::string::npos);
  EXPECT_NE(problem_of("efficiency: {gemm: 1.2}\n").find("number above 0 and at most 1"), std::string::npos);
  EXPECT_NE(problem_of("nodes: 1\nnodes: 2\n").find("duplicate key \"nodes\""), std::string::npos);
  EXPECT_NE(problem_of("[1, 2]").find("expected a map of keys"), std::string::npos);
  EXPECT_NE(problem_of("nodes: [").find("not valid YAML"), std::string::npos);
  // Every missing key at once, those of devices only where there are devices.
  const std::string missing = problem_of("nodes: 1\nranks_per_node: 8\n");
  EXPECT_NE(missing.find("missing key \"compute.bf16_tflops\" (TFLOP/s)"), std::string::npos);
  EXPECT_NE(missing.find("missing key \"filesystem.read_gbs\""), std::string::npos);
  EXPECT_EQ(missing.find("memory.device_gib"), std::string::npos);
  EXPECT_NE(problem_of("device: cuda\n").find("memory.device_gib"), std::string::npos);
}

TEST(Cluster, TheDocumentationHoldsTheKeys) {
  std::ifstream file(std::string(ISOBATH_SOURCE_ROOT) + "/docs/performance.md");
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_NE(text.str().find(cluster_keys_markdown()), std::string::npos) << cluster_keys_markdown();
}

TEST(Cluster, RanksFillNodes) {
  const Cluster node = parse_cluster(shipped("h100-node"), "h100-node");
  const auto shape = [&](int64_t n) {
    const Cluster c = with_ranks(node, n);
    return std::pair{c.nodes, c.ranks_per_node};
  };
  EXPECT_EQ(shape(8), (std::pair<int64_t, int64_t>{1, 8}));
  EXPECT_EQ(shape(32), (std::pair<int64_t, int64_t>{4, 8}));
  EXPECT_EQ(shape(2), (std::pair<int64_t, int64_t>{1, 2}));
  EXPECT_EQ(shape(12), (std::pair<int64_t, int64_t>{2, 6}));
  EXPECT_EQ(shape(11), (std::pair<int64_t, int64_t>{11, 1}));
}

}  // namespace
}  // namespace isobath::plan
