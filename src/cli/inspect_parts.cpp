#include <ATen/ATen.h>

#include <fmt/ranges.h>

#include <algorithm>
#include <isobath/cli/inspect.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/model/model_config.hpp>
#include <isobath/report/table.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "statistics_path.hpp"

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;

/// One scored part; rows and columns that a granularity does not have are absent.
struct Part {
  int64_t block = 0;
  std::string module;
  std::optional<int64_t> row, channel;
  double score = 0;  ///< per token
  double share = 0;  ///< of the part it belongs to: weight and channel of the module, block of the model
  std::optional<double> value;  ///< weight: itself; channel: max|x|
};

/// α⁽⁶⁾ of one linear, per token.
struct Linear {
  int64_t block;
  std::string module;
  at::Tensor alpha, max_abs_x;  ///< [d_in] f64
};

/// Calls use(linear) for every linear of the statistics; returns the fingerprint of their model.
template <class Use>
std::string for_each_linear(const fs::path& path, const Use& use) {
  std::string model;
  for (const fs::path& file_path : block_files(path)) {
    const io::Hdf5Reader file(file_path);
    model = text_of(file, "/", "model");
    const int64_t block = file.has_attribute("/", "block") ? integer_of(file, "/", "block", file_path) : -1;
    for (const std::string& group : file.members("/")) {
      if (!file.contains(group + "/alpha_per_token")) continue;
      const auto n_tokens =
          static_cast<double>(std::max<int64_t>(1, integer_of(file, group, "n_tokens", file_path)));
      const auto [alpha, max_abs_x] = read_channels(file, group, file_path);
      use(Linear{block, group, alpha / n_tokens, max_abs_x.to(at::kDouble)});
    }
  }
  return model;
}

class Largest {
 public:
  explicit Largest(int64_t n) : n_(static_cast<size_t>(n)) {}

  void add(Part part) { parts_.push_back(std::move(part)); }
  /// The n largest, ties in the order they came.
  [[nodiscard]] std::vector<Part> take() {
    shorten();
    return std::move(parts_);
  }
  void shorten() {
    std::stable_sort(parts_.begin(), parts_.end(),
                     [](const Part& a, const Part& b) { return a.score > b.score; });
    if (parts_.size() > n_) parts_.resize(n_);
  }

 private:
  size_t n_;
  std::vector<Part> parts_;
};

std::vector<Part> channels_of(const fs::path& path, int64_t n) {
  Largest largest(n);
  for_each_linear(path, [&](const Linear& linear) {
    const auto [scores, places] = linear.alpha.topk(std::min(n, linear.alpha.numel()));
    const double total = linear.alpha.sum().item<double>();
    for (int64_t k = 0; k < scores.numel(); ++k) {
      const double score = scores[k].item<double>();
      const auto channel = places[k].item<int64_t>();
      largest.add({linear.block,
                   linear.module,
                   {},
                   channel,
                   score,
                   total > 0 ? score / total : 0,
                   linear.max_abs_x[channel].item<double>()});
    }
    largest.shorten();
  });
  return largest.take();
}

std::vector<Part> blocks_of(const fs::path& path, int64_t n) {
  struct Sum {
    double total = 0, most = -1;
    std::string module;
  };
  std::map<int64_t, Sum> sums;
  double total = 0;
  for_each_linear(path, [&](const Linear& linear) {
    const double score = linear.alpha.sum().item<double>();
    Sum& sum = sums[linear.block];
    sum.total += score;
    total += score;
    if (score <= sum.most) return;
    sum.most = score;
    sum.module = linear.module;
  });
  Largest largest(n);
  for (const auto& [block, sum] : sums)
    largest.add({block, sum.module, {}, {}, sum.total, total > 0 ? sum.total / total : 0, {}});
  return largest.take();
}

/// `model.layers.7.mlp.down_proj.weight` of block 7's group down_proj.
std::string weight_name(const Linear& linear) {
  for (int p = 0; p < model::kProjections; ++p) {
    const auto projection = static_cast<model::Projection>(p);
    if (model::name_of(projection) == linear.module)
      return model::module_name(linear.block, projection) + ".weight";
  }
  fail<DataError>("block {}: {} is no linear of a block", linear.block, linear.module);
}

std::vector<Part> weights_of(const fs::path& path, int64_t n, const fs::path& directory) {
  const io::ShardedReader tensors(directory);
  Largest largest(n);
  const std::string measured = for_each_linear(path, [&](const Linear& linear) {
    const std::string name = weight_name(linear);
    if (!tensors.contains(name))
      fail<DataError>("{}: there is no tensor {}; expected the model that was measured, unquantized",
                      directory.string(), name);
    const at::Tensor weight = tensors.read(name);
    if (weight.dim() != 2 || weight.size(1) != linear.alpha.size(0))
      fail<DataError>("{}: {}: expected {} input channels as in the statistics, found shape [{}]",
                      directory.string(), name, linear.alpha.size(0), fmt::join(weight.sizes(), ", "));
    const at::Tensor saliency = weight.to(at::kDouble)
                                    .square_()
                                    .mul_(linear.alpha * (0.5 / static_cast<double>(weight.size(0))))
                                    .flatten();
    const auto [scores, places] = saliency.topk(std::min(n, saliency.numel()));
    const double total = saliency.sum().item<double>();
    for (int64_t k = 0; k < scores.numel(); ++k) {
      const double score = scores[k].item<double>();
      const auto place = places[k].item<int64_t>();
      const int64_t row = place / weight.size(1), channel = place % weight.size(1);
      largest.add({linear.block, linear.module, row, channel, score, total > 0 ? score / total : 0,
                   weight[row][channel].item<double>()});
    }
    largest.shorten();
  });
  if (measured != tensors.fingerprint())
    fail<DataError>("{}: the statistics are of another model: {} was measured, {} is {}", path.string(),
                    measured, directory.string(), tensors.fingerprint());
  return largest.take();
}

std::string as_json(const fs::path& path, const std::vector<Part>& parts, const char* name) {
  nlohmann::ordered_json result = {{"path", path.string()}, {name, nlohmann::ordered_json::array()}};
  for (const Part& part : parts) {
    nlohmann::ordered_json entry = {{"block", part.block}};
    entry[part.channel ? "module" : "most_sensitive_module"] = part.module;
    if (part.row) entry["row"] = *part.row;
    if (part.channel) entry["channel"] = *part.channel;
    if (part.value) entry[part.row ? "weight" : "max_abs_x"] = *part.value;
    entry[part.row ? "saliency_per_token" : "sensitivity_per_token"] = part.score;
    entry["share"] = part.share;
    result[name].push_back(std::move(entry));
  }
  return result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string as_table(const std::vector<Part>& parts, Granularity by) {
  const auto percent = [](double share) { return fmt::format("{:.2f} %", 100 * share); };
  report::Table table(
      by == Granularity::block
          ? std::vector<std::string>{"block", "Σα⁽⁶⁾ per token", "of the model", "most sensitive"}
      : by == Granularity::channel ? std::vector<std::string>{"block", "module", "channel", "α⁽⁶⁾ per token",
                                                              "of the module", "max|x|"}
                                   : std::vector<std::string>{"block", "module", "row", "channel", "weight",
                                                              "½ H_jj w² per token", "of the module"});
  for (const Part& part : parts) {
    const std::string block = std::to_string(part.block), score = fmt::format("{:.3e}", part.score);
    if (by == Granularity::block)
      table.add({block, score, percent(part.share), part.module});
    else if (by == Granularity::channel)
      table.add({block, part.module, std::to_string(*part.channel), score, percent(part.share),
                 fmt::format("{:.4g}", *part.value)});
    else
      table.add({block, part.module, std::to_string(*part.row), std::to_string(*part.channel),
                 fmt::format("{:.4g}", *part.value), score, percent(part.share)});
  }
  const char* meaning =
      by == Granularity::weight
          ? "½ H_jj w², H_jj = α⁽⁶⁾_j / d_out: nats that removing the weight alone costs, to second order.\n"
          : "α⁽⁶⁾_j = Σ_i ‖G_i‖² x_ij², nat² per weight unit².\n";
  return table.text() + meaning;
}

}  // namespace

std::string inspect_parts(const fs::path& path, const PartsRequest& request) {
  const std::vector<Part> parts = request.by == Granularity::block ? blocks_of(path, request.n_rows)
                                  : request.by == Granularity::channel
                                      ? channels_of(path, request.n_rows)
                                      : weights_of(path, request.n_rows, request.model);
  if (parts.empty())
    fail<DataError>("{}: expected groups with a dataset alpha_per_token, found none; are these statistics?",
                    path.string());
  const char* name = request.by == Granularity::block     ? "blocks"
                     : request.by == Granularity::channel ? "channels"
                                                          : "weights";
  return request.as_json ? as_json(path, parts, name) : as_table(parts, request.by);
}

}  // namespace isobath::cli
