#include <isobath/cli/compare.hpp>

#include <ATen/ATen.h>

#include <isobath/core/error.hpp>
#include <isobath/report/table.hpp>
#include <nlohmann/json.hpp>
#include <optional>

#include "statistics_path.hpp"

namespace isobath::cli {
namespace {

namespace fs = std::filesystem;

struct Difference {
  std::string module;
  double cosine_x2 = 0, cosine_alpha = 0;
  double sensitivity_ratio = 0;  ///< Σα⁽⁶⁾ a token, second over first
  std::optional<double> cosine_d;
};

struct Comparison {
  bool same_tokens = false;
  std::vector<Difference> differences;  ///< the least alike first
  double mean_x2 = 0, mean_alpha = 0;
};

double cosine(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.to(at::kDouble).flatten(), y = b.to(at::kDouble).flatten();
  const double norms = x.norm().item<double>() * y.norm().item<double>();
  return norms > 0 ? (x * y).sum().item<double>() / norms : 0;
}

/// Whether D of a linear is that of the same rows in both.
bool have_same_groups(const io::Hdf5Reader& a, const io::Hdf5Reader& b, const std::string& group) {
  if (text_of(a, "/", "row_groups") != text_of(b, "/", "row_groups")) return false;
  for (const char* name : {"/row_order", "/row_group_sizes"})
    if (a.contains(group + name) && !at::equal(a.read(group + name), b.read(group + name))) return false;
  return true;
}

Comparison compare(const fs::path& first, const fs::path& second) {
  const std::vector<fs::path> a_files = block_files(first), b_files = block_files(second);
  // Statistics from behind a quantized prefix lack the blocks of the prefix: those in both are compared.
  Comparison result;
  for (const fs::path& a_path : a_files) {
    const auto found = std::find_if(b_files.begin(), b_files.end(), [&](const fs::path& path) {
      return path.filename() == a_path.filename() || (a_files.size() == 1 && b_files.size() == 1);
    });
    if (found == b_files.end()) continue;
    const io::Hdf5Reader a(a_path), b(*found);
    const std::string model = text_of(a, "/", "model"), other = text_of(b, "/", "model");
    if (model != other)
      fail<DataError>("{} and {} hold statistics of different models: {} and {}", a_path.string(),
                      found->string(), model, other);
    const std::string tokens = text_of(a, "/", "tokens");
    result.same_tokens = tokens != "unknown" && tokens == text_of(b, "/", "tokens") &&
                         text_of(a, "/", "n_sequences") == text_of(b, "/", "n_sequences") &&
                         text_of(a, "/", "length") == text_of(b, "/", "length");
    for (const std::string& group : a.members("/")) {
      if (!a.contains(group + "/alpha_per_token")) continue;
      if (!b.contains(group + "/alpha_per_token"))
        fail<DataError>("{} lacks {}, which {} has", found->string(), group, a_path.string());
      const auto both = [&](const char* name) {
        std::pair<at::Tensor, at::Tensor> tensors{a.read(group + "/" + name), b.read(group + "/" + name)};
        return tensors;
      };
      const auto [x2_a, x2_b] = both("sum_x2");
      const auto [alpha_a, alpha_b] = both("alpha_per_token");
      if (x2_a.sizes() != x2_b.sizes() || alpha_a.sizes() != alpha_b.sizes())
        fail<DataError>("{} of {} and of {} have {} and {} channels", group, a_path.string(), found->string(),
                        alpha_a.numel(), alpha_b.numel());
      Difference& difference = result.differences.emplace_back();
      difference.module = text_of(a, group, "module");
      difference.cosine_x2 = cosine(x2_a, x2_b);
      difference.cosine_alpha = cosine(alpha_a, alpha_b);
      const auto per_token = [&](const at::Tensor& alpha, const io::Hdf5Reader& file, const fs::path& path) {
        return alpha.sum().item<double>() /
               static_cast<double>(std::max<int64_t>(1, integer_of(file, group, "n_tokens", path)));
      };
      const double before = per_token(alpha_a, a, a_path);
      difference.sensitivity_ratio = before > 0 ? per_token(alpha_b, b, *found) / before : 0;
      if (!result.same_tokens) continue;
      const auto [d_a, d_b] = both("token_weights");
      if (d_a.sizes() == d_b.sizes() && have_same_groups(a, b, group)) difference.cosine_d = cosine(d_a, d_b);
    }
  }
  if (result.differences.empty())
    fail<DataError>("{} and {} have no block in common", first.string(), second.string());
  for (const Difference& difference : result.differences) {
    result.mean_x2 += difference.cosine_x2 / static_cast<double>(result.differences.size());
    result.mean_alpha += difference.cosine_alpha / static_cast<double>(result.differences.size());
  }
  std::stable_sort(result.differences.begin(), result.differences.end(),
                   [](const Difference& a, const Difference& b) { return a.cosine_alpha < b.cosine_alpha; });
  return result;
}

}  // namespace

std::string compare_table(const fs::path& first, const fs::path& second, int64_t n_rows) {
  const Comparison found = compare(first, second);
  report::Table table({"least alike", "cosine α⁽⁶⁾", "cosine E x²", "Σα⁽⁶⁾ ratio", "cosine D"});
  const auto n_shown = std::min(std::ssize(found.differences), n_rows);
  for (int64_t i = 0; i < n_shown; ++i) {
    const Difference& line = found.differences[static_cast<size_t>(i)];
    table.add({line.module, fmt::format("{:.4f}", line.cosine_alpha), fmt::format("{:.4f}", line.cosine_x2),
               fmt::format("{:.3f}", line.sensitivity_ratio),
               line.cosine_d ? fmt::format("{:.4f}", *line.cosine_d) : "—"});
  }
  return fmt::format(
      "{}\nThe {} least alike of {} linears; mean cosine of α⁽⁶⁾ {:.4f}, of E x² {:.4f}. Σα⁽⁶⁾ ratio: a "
      "token, "
      "second over first.\nD is compared where both have the same tokens{}.\n",
      table.text(), n_shown, found.differences.size(), found.mean_alpha, found.mean_x2,
      found.same_tokens ? "" : "; these have not");
}

std::string compare_json(const fs::path& first, const fs::path& second) {
  const Comparison found = compare(first, second);
  nlohmann::ordered_json result = {
      {"first", first.string()},          {"second", second.string()},
      {"same_tokens", found.same_tokens}, {"mean_cosine_alpha", found.mean_alpha},
      {"mean_cosine_x2", found.mean_x2},  {"modules", nlohmann::ordered_json::array()}};
  for (const Difference& line : found.differences) {
    nlohmann::ordered_json cosine_d;
    if (line.cosine_d) cosine_d = *line.cosine_d;
    result["modules"].push_back({{"module", line.module},
                                 {"cosine_alpha", line.cosine_alpha},
                                 {"cosine_x2", line.cosine_x2},
                                 {"sensitivity_ratio", line.sensitivity_ratio},
                                 {"cosine_d", cosine_d}});
  }
  return result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace isobath::cli
