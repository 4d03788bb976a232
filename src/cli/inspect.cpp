#include <isobath/cli/inspect.hpp>

#include <ATen/ATen.h>

#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/report/table.hpp>
#include <nlohmann/json.hpp>
#include <optional>

#include "statistics_path.hpp"

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;

/// One line of the table.
struct ModuleLine {
  int64_t block, d_in, n_tokens;
  std::string module;
  double alpha;                       ///< Σ_j α⁽⁶⁾_j
  std::optional<double> cross_token;  ///< 1 − Σα⁽⁶⁾ / Σα⁽⁵⁾
  double n_effective;
  double max_abs_x;
  double top_share;  ///< largest α⁽⁶⁾_j over their sum
  int64_t top_channel;

  [[nodiscard]] double per_token() const { return n_tokens > 0 ? alpha / static_cast<double>(n_tokens) : 0; }
};

struct Statistics {
  std::string model, loss, n_sequences, length;
  size_t n_files = 0;
  std::vector<ModuleLine> lines;
};

double total_of(const at::Tensor& tensor) {
  return tensor.to(at::kDouble).sum().item<double>();
}

ModuleLine read_module(const io::Hdf5Reader& file, const std::string& group, int64_t block,
                       const fs::path& path) {
  const auto [alpha, max_abs_x] = read_channels(file, group, path);
  ModuleLine line{};
  line.block = block;
  line.module = group;
  line.d_in = alpha.size(0);
  line.n_tokens = integer_of(file, group, "n_tokens", path);
  line.alpha = total_of(alpha);
  line.top_channel = alpha.argmax().item<int64_t>();
  line.top_share = line.alpha > 0 ? alpha[line.top_channel].item<double>() / line.alpha : 0;
  line.max_abs_x = max_abs_x.max().item<double>();
  if (file.contains(group + "/alpha_per_sequence")) {
    const double per_sequence = total_of(file.read(group + "/alpha_per_sequence"));
    if (per_sequence > 0) line.cross_token = 1 - line.alpha / per_sequence;
  }
  // D of the whole linear: the mean over its output channels; groups without sizes of their own have the
  // same, or one more.
  at::Tensor weights = file.read(group + "/token_weights").to(at::kDouble);
  if (const std::string sizes = group + "/row_group_sizes"; file.contains(sizes)) {
    const at::Tensor shares = file.read(sizes).to(at::kDouble);
    weights = weights.matmul(shares / shares.sum());
  } else {
    weights = weights.mean(-1);
  }
  const double total = total_of(weights), squares = total_of(weights.square());
  line.n_effective = squares > 0 ? total * total / squares : 0;
  return line;
}

Statistics read_statistics(const fs::path& path) {
  Statistics found;
  for (const fs::path& file_path : block_files(path)) {
    const io::Hdf5Reader file(file_path);
    const size_t n_before = found.lines.size();
    const int64_t block = file.has_attribute("/", "block") ? integer_of(file, "/", "block", file_path) : -1;
    for (const std::string& group : file.members("/"))
      if (file.contains(group + "/alpha_per_token"))
        found.lines.push_back(read_module(file, group, block, file_path));
    if (found.lines.size() == n_before)
      fail<DataError>(
          "{}: expected groups with a dataset alpha_per_token, found none; is this a statistics file?",
          file_path.string());
    if (found.n_files++ > 0) continue;
    found.model = text_of(file, "/", "model");
    found.loss = text_of(file, "/", "loss");
    found.n_sequences = text_of(file, "/", "n_sequences");
    found.length = text_of(file, "/", "length");
  }
  std::stable_sort(found.lines.begin(), found.lines.end(),
                   [](const ModuleLine& a, const ModuleLine& b) { return a.per_token() > b.per_token(); });
  return found;
}

std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

}  // namespace

std::string inspect_table(const fs::path& path, int64_t n_rows) {
  const Statistics found = read_statistics(path);
  report::Table table({"block", "module", "d_in", "Σα⁽⁶⁾", "per token", "cross-token", "n_eff", "n_eff/d_in",
                       "max|x|", "top channel"});
  const auto n_shown = std::min(found.lines.size(), static_cast<size_t>(n_rows));
  for (size_t i = 0; i < n_shown; ++i) {
    const ModuleLine& line = found.lines[i];
    table.add({std::to_string(line.block), line.module, std::to_string(line.d_in),
               fmt::format("{:.3e}", line.alpha), fmt::format("{:.3e}", line.per_token()),
               line.cross_token ? percent(*line.cross_token) : "—", fmt::format("{:.1f}", line.n_effective),
               fmt::format("{:.3f}", line.n_effective / static_cast<double>(line.d_in)),
               fmt::format("{:.4g}", line.max_abs_x), percent(line.top_share)});
  }
  return fmt::format(
      "{}: {} modules of {} blocks; model {}, loss {}, {} sequences of {} tokens\n\n{}\n"
      "The {} most sensitive of {} modules. Σα⁽⁶⁾ = Σ_j Σ_i ‖G_i‖² x_ij² (nat² per weight unit²), sorted by "
      "its value per "
      "token;\ncross-token = 1 − Σα⁽⁶⁾/Σα⁽⁵⁾; n_eff = (ΣD)²/ΣD² tokens carry the weight; top channel = its "
      "share of Σα⁽⁶⁾.\n",
      path.string(), found.lines.size(), found.n_files, found.model, found.loss, found.n_sequences,
      found.length, table.text(), n_shown, found.lines.size());
}

std::string inspect_json(const fs::path& path) {
  const Statistics found = read_statistics(path);
  nlohmann::ordered_json result = {{"path", path.string()},  {"model", found.model},
                                   {"loss", found.loss},     {"n_sequences", found.n_sequences},
                                   {"length", found.length}, {"modules", nlohmann::ordered_json::array()}};
  for (const ModuleLine& line : found.lines) {
    nlohmann::ordered_json cross_token;
    if (line.cross_token) cross_token = *line.cross_token;
    result["modules"].push_back({{"block", line.block},
                                 {"module", line.module},
                                 {"d_in", line.d_in},
                                 {"n_tokens", line.n_tokens},
                                 {"alpha_per_token_sum", line.alpha},
                                 {"sensitivity_per_token", line.per_token()},
                                 {"cross_token_mass", cross_token},
                                 {"n_effective", line.n_effective},
                                 {"n_effective_over_d_in", line.n_effective / static_cast<double>(line.d_in)},
                                 {"max_abs_x", line.max_abs_x},
                                 {"top_channel", line.top_channel},
                                 {"top_channel_share", line.top_share}});
  }
  return result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace isobath::cli
