#include <isobath/plan/cluster.hpp>

#include <yaml-cpp/yaml.h>

#include <charconv>
#include <isobath/config/schema.hpp>
#include <isobath/core/error.hpp>
#include <set>

namespace isobath::plan {
namespace {

enum class Need { always, with_devices, with_gram, optional };

/// One number of a cluster description: the source of parsing, writing and documentation.
struct Field {
  std::string key, unit, meaning;
  Need need;
  std::function<double(const Cluster&)> get;
  std::function<void(Cluster&, double)> set;
  bool is_count = false;
};

template <class Member>
Field number(std::string key, std::string unit, std::string meaning, Need need, Member member) {
  using Value = std::remove_cvref_t<std::invoke_result_t<Member, Cluster&>>;
  return {std::move(key),
          std::move(unit),
          std::move(meaning),
          need,
          [member](const Cluster& c) { return static_cast<double>(member(c)); },
          [member](Cluster& c, double value) { member(c) = static_cast<Value>(value); },
          std::is_integral_v<Value>};
}

const std::vector<Field>& fields() {
  using enum Need;
  static const std::vector<Field> kFields{
      number(
          "nodes", "nodes", "nodes of the job", always, [](auto& c) -> auto& { return c.nodes; }),
      number(
          "ranks_per_node", "ranks", "ranks on each node; one a device with cuda", always,
          [](auto& c) -> auto& { return c.ranks_per_node; }),
      number(
          "memory.node_gib", "GiB", "host memory of a node", always,
          [](auto& c) -> auto& { return c.memory.node_gib; }),
      number(
          "memory.device_gib", "GiB", "memory of one device", with_devices,
          [](auto& c) -> auto& { return c.memory.device_gib; }),
      number(
          "compute.bf16_tflops", "TFLOP/s", "bf16 matrix product of one rank", always,
          [](auto& c) -> auto& { return c.compute.bf16_tflops; }),
      number(
          "compute.f32_tflops", "TFLOP/s", "f32 matrix product of one rank", always,
          [](auto& c) -> auto& { return c.compute.f32_tflops; }),
      number(
          "compute.covariance_tflops", "TFLOP/s", "covariance kernel of one rank, what it executes",
          with_gram, [](auto& c) -> auto& { return c.compute.covariance_tflops; }),
      number(
          "compute.attention_tflops", "TFLOP/s", "attention of one rank, causal pairs counted", always,
          [](auto& c) -> auto& { return c.compute.attention_tflops; }),
      number(
          "compute.memory_gbs", "GB/s", "memory of the device (with cpu: the rank's share), read + written",
          always, [](auto& c) -> auto& { return c.compute.memory_gbs; }),
      number(
          "compute.operation_us", "us", "to start one operation", always,
          [](auto& c) -> auto& { return c.compute.operation_us; }),
      number(
          "compute.host_link_gbs", "GB/s", "device to host or back, one rank", with_devices,
          [](auto& c) -> auto& { return c.compute.host_link_gbs; }),
      number(
          "host.threads", "threads", "of one rank", always, [](auto& c) -> auto& { return c.host.threads; }),
      number(
          "host.f64_factor_tflops", "TFLOP/s", "f64 triangular solve with 128 columns of one rank", always,
          [](auto& c) -> auto& { return c.host.f64_factor_tflops; }),
      number(
          "host.f64_gemm_tflops", "TFLOP/s",
          "f64 matrix product of one rank (factorization, asymmetric correction)", always,
          [](auto& c) -> auto& { return c.host.f64_gemm_tflops; }),
      number(
          "host.f32_thin_tflops", "TFLOP/s", "f32 product with 64 columns of one rank", always,
          [](auto& c) -> auto& { return c.host.f32_thin_tflops; }),
      number(
          "host.column_gflops", "GFLOP/s", "column loop of GPTQ, one thread", always,
          [](auto& c) -> auto& { return c.host.column_gflops; }),
      number(
          "host.candidate_gps", "1e9/s", "weights x candidate grids of the clip search, one thread", always,
          [](auto& c) -> auto& { return c.host.candidate_gps; }),
      number(
          "host.pack_gps", "1e9/s", "codes packed or unpacked, one thread", always,
          [](auto& c) -> auto& { return c.host.pack_gps; }),
      number(
          "host.memory_gbs", "GB/s", "host memory, a rank's share, read + written", always,
          [](auto& c) -> auto& { return c.host.memory_gbs; }),
      number(
          "rows.f64_factor_tflops", "TFLOP/s", "f64 triangular solve with 128 columns", with_devices,
          [](auto& c) -> auto& { return c.rows.f64_factor_tflops; }),
      number(
          "rows.f64_gemm_tflops", "TFLOP/s", "f64 matrix product (factorization)", with_devices,
          [](auto& c) -> auto& { return c.rows.f64_gemm_tflops; }),
      number(
          "rows.product_tflops", "TFLOP/s", "f32 product of the rows' kernels", with_devices,
          [](auto& c) -> auto& { return c.rows.product_tflops; }),
      number(
          "rows.column_us", "us", "a column of the column loop beyond its products, all rows together",
          with_devices, [](auto& c) -> auto& { return c.rows.column_us; }),
      number(
          "rows.refined_column_us", "us", "the same of a sweep of refinement", with_devices,
          [](auto& c) -> auto& { return c.rows.refined_column_us; }),
      number(
          "rows.candidate_gps", "1e9/s", "weights x candidate grids of the clip search", with_devices,
          [](auto& c) -> auto& { return c.rows.candidate_gps; }),
      number(
          "network.within_node_gbs", "GB/s", "MPI, each rank when all send, on one node", always,
          [](auto& c) -> auto& { return c.network.within_node_gbs; }),
      number(
          "network.between_nodes_gbs", "GB/s", "MPI, each rank when all send, between nodes", always,
          [](auto& c) -> auto& { return c.network.between_nodes_gbs; }),
      number(
          "network.device_within_node_gbs", "GB/s", "device memory, one direction, on one node", with_devices,
          [](auto& c) -> auto& { return c.network.device_within_node_gbs; }),
      number(
          "network.device_between_nodes_gbs", "GB/s", "device memory, one direction, between nodes",
          with_devices, [](auto& c) -> auto& { return c.network.device_between_nodes_gbs; }),
      number(
          "network.latency_us", "us", "of one message", always,
          [](auto& c) -> auto& { return c.network.latency_us; }),
      number(
          "filesystem.read_gbs", "GB/s", "the job's reads", always,
          [](auto& c) -> auto& { return c.filesystem.read_gbs; }),
      number(
          "filesystem.write_gbs", "GB/s", "the job's writes, to stable storage", always,
          [](auto& c) -> auto& { return c.filesystem.write_gbs; }),
      number(
          "filesystem.node_read_gbs", "GB/s", "one node's reads", always,
          [](auto& c) -> auto& { return c.filesystem.node_read_gbs; }),
      number(
          "filesystem.node_write_gbs", "GB/s", "one node's writes", always,
          [](auto& c) -> auto& { return c.filesystem.node_write_gbs; }),
      number(
          "efficiency.gemm", "", "share of compute.bf16_tflops that is reached", optional,
          [](auto& c) -> auto& { return c.efficiency.gemm; }),
      number(
          "efficiency.f32_gemm", "", "share of compute.f32_tflops", optional,
          [](auto& c) -> auto& { return c.efficiency.f32_gemm; }),
      number(
          "efficiency.covariance", "", "share of compute.covariance_tflops", optional,
          [](auto& c) -> auto& { return c.efficiency.covariance; }),
      number(
          "efficiency.attention", "", "share of compute.attention_tflops", optional,
          [](auto& c) -> auto& { return c.efficiency.attention; }),
      number(
          "efficiency.memory", "", "share of compute.memory_gbs, host.memory_gbs and host_link_gbs", optional,
          [](auto& c) -> auto& { return c.efficiency.memory; }),
      number(
          "efficiency.host", "",
          "share of the tflops of host; the others are measured always, no vendor states them", optional,
          [](auto& c) -> auto& { return c.efficiency.host; }),
      number(
          "efficiency.network", "", "share of the rates of network", optional,
          [](auto& c) -> auto& { return c.efficiency.network; }),
      number(
          "efficiency.filesystem", "", "share of the rates of filesystem", optional,
          [](auto& c) -> auto& { return c.efficiency.filesystem; }),
  };
  return kFields;
}

const Field* find_field(const std::string& key) {
  for (const Field& field : fields())
    if (field.key == key) return &field;
  return nullptr;
}

std::vector<std::string> known_keys() {
  std::vector<std::string> keys{"name", "device"};
  for (const Field& field : fields()) keys.push_back(field.key);
  return keys;
}

class Parser {
 public:
  explicit Parser(std::string source) : source_(std::move(source)) {}

  Cluster parse(const std::string& yaml) {
    try {
      const YAML::Node root = YAML::Load(yaml);
      if (root.IsMap())
        walk("", root);
      else
        report(source_, "expected a map of keys such as {nodes: 4, ranks_per_node: 8, ...}");
    } catch (const YAML::Exception& error) {
      report(fmt::format("{}:{}", source_, error.mark.line + 1), "not valid YAML: " + error.msg);
    }
    if (problems_.empty()) require_all();
    if (!problems_.empty()) throw ConfigError(fmt::format("{}", fmt::join(problems_, "\n")));
    // Without devices every message is one of the host.
    if (!cluster_.has_devices()) {
      cluster_.network.device_within_node_gbs = cluster_.network.within_node_gbs;
      cluster_.network.device_between_nodes_gbs = cluster_.network.between_nodes_gbs;
    }
    return cluster_;
  }

 private:
  void walk(const std::string& prefix, const YAML::Node& node) {
    for (const auto& entry : node) {
      const std::string key = prefix + (entry.first.IsScalar() ? entry.first.Scalar() : "?");
      const std::string place = fmt::format("{}:{}", source_, entry.first.Mark().line + 1);
      if (!seen_.insert(key).second) {
        report(place, fmt::format("duplicate key \"{}\"", key));
      } else if (key == "name" || key == "device") {
        read_word(key, entry.second, place);
      } else if (const Field* field = find_field(key)) {
        read_number(*field, entry.second, place);
      } else if (entry.second.IsMap()) {
        walk(key + ".", entry.second);
      } else {
        const std::string near = config::nearest_key(key, known_keys());
        report(place, fmt::format("unknown key \"{}\"{}", key,
                                  near.empty() ? "; docs/performance.md lists the keys of a cluster"
                                               : fmt::format("; did you mean \"{}\"?", near)));
      }
    }
  }

  void read_word(const std::string& key, const YAML::Node& node, const std::string& place) {
    const std::string text = node.IsScalar() ? node.Scalar() : "";
    if (key == "name") {
      cluster_.name = text;
    } else if (text == "cpu" || text == "cuda") {
      cluster_.device = text;
    } else {
      report(place, fmt::format("device: expected cpu or cuda, found \"{}\"", text));
    }
  }

  void read_number(const Field& field, const YAML::Node& node, const std::string& place) {
    double value = 0;
    const std::string text = node.IsScalar() ? node.Scalar() : "";
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool is_number = error == std::errc() && end == text.data() + text.size() && !text.empty();
    // operation_us and latency_us may be 0; nothing else may.
    const bool may_be_zero = field.unit == "us";
    const bool is_share = field.key.starts_with("efficiency.");
    if (!is_number || !std::isfinite(value) || value < 0 || (value == 0 && !may_be_zero) ||
        (field.is_count && (value != std::floor(value) || value > 1e6)) || (is_share && value > 1))
      return report(place, fmt::format("{}: expected a {}{}, found \"{}\"", field.key,
                                       field.is_count ? "whole positive number"
                                       : is_share     ? "number above 0 and at most 1"
                                       : may_be_zero  ? "number of at least 0"
                                                      : "positive number",
                                       field.unit.empty() ? "" : " (" + field.unit + ")", text));
    field.set(cluster_, value);
  }

  void require_all() {
    for (const Field& field : fields()) {
      const bool is_needed =
          field.need == Need::always || (field.need == Need::with_devices && cluster_.has_devices());
      if (is_needed && !seen_.contains(field.key))
        report(source_, fmt::format("missing key \"{}\" ({}): {}", field.key, field.unit, field.meaning));
    }
  }

  void report(const std::string& where, const std::string& what) { problems_.push_back(where + ": " + what); }

  std::string source_;
  Cluster cluster_;
  std::set<std::string> seen_;
  std::vector<std::string> problems_;
};

}  // namespace

Cluster with_ranks(Cluster cluster, int64_t n_ranks) {
  ISOBATH_CHECK(n_ranks >= 1, "{} ranks", n_ranks);
  cluster.ranks_per_node = std::min(cluster.ranks_per_node, n_ranks);
  cluster.nodes = (n_ranks + cluster.ranks_per_node - 1) / cluster.ranks_per_node;
  // A count that does not fill the nodes is planned as full nodes of fewer ranks.
  while (cluster.nodes * cluster.ranks_per_node != n_ranks) {
    --cluster.ranks_per_node;
    cluster.nodes = (n_ranks + cluster.ranks_per_node - 1) / cluster.ranks_per_node;
  }
  return cluster;
}

Cluster parse_cluster(const std::string& yaml, const std::string& source) {
  return Parser(source).parse(yaml);
}

std::string cluster_yaml(const Cluster& cluster, const std::string& comment) {
  std::string text = "# " + comment + "\n";
  text += fmt::format("name: {}\ndevice: {}  # cpu | cuda\n", cluster.name, cluster.device);
  std::string section;
  for (const Field& field : fields()) {
    if (field.need == Need::with_devices && !cluster.has_devices()) continue;
    if (field.need == Need::with_gram && !cluster.has_gram()) continue;
    const size_t dot = field.key.find('.');
    const std::string of_key = dot == std::string::npos ? "" : field.key.substr(0, dot);
    if (of_key != section) text += of_key + ":\n";
    section = of_key;
    text += fmt::format("{}{}: {:.4g}{}\n", section.empty() ? "" : "  ",
                        field.key.substr(dot == std::string::npos ? 0 : dot + 1), field.get(cluster),
                        fmt::format("  # {}{}{}", field.unit, field.unit.empty() ? "" : ", ", field.meaning));
  }
  return text;
}

std::string cluster_keys_markdown() {
  std::string text =
      "| key | unit | meaning |\n| --- | --- | --- |\n| `name` | | shown with the plan |\n"
      "| `device` | | `cpu`: ranks compute on the host; `cuda`: one device a rank |\n";
  for (const Field& field : fields())
    text +=
        fmt::format("| `{}` | {} | {}{} |\n", field.key, field.unit, field.meaning,
                    field.need == Need::optional       ? " (default 1)"
                    : field.need == Need::with_devices ? " (only with cuda)"
                    : field.need == Need::with_gram ? " (CPUs: bf16 with AVX-512 BF16 or AMX, f32 with AVX2; "
                                                      "without it ATen's operations are counted)"
                                                    : "");
  return text;
}

}  // namespace isobath::plan
