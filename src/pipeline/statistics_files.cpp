#include <isobath/pipeline/statistics_files.hpp>

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>

namespace isobath::pipeline {
namespace {

std::string group_of(int projection) {
  return std::string(model::name_of(static_cast<model::Projection>(projection)));
}

void write_perturbations(io::Hdf5Writer& file, const std::string& module, const Perturbations& scores) {
  const std::string group = module + "/perturbations";
  const auto dataset = [&](const std::string& name, const at::Tensor& tensor, const std::string& unit,
                           const std::string& equation) {
    file.write(group + "/" + name, tensor);
    file.attribute(group + "/" + name, "unit", unit);
    file.attribute(group + "/" + name, "equation", equation);
  };
  dataset("bits", at::tensor(scores.bits, at::kLong), "bits", "widths of the candidates, index k");
  dataset("first_order", scores.first_order, "nat",
          "s[s,r,k] = <G, X dW_k^T> of sequence s and label draw r");
  dataset("output_change", scores.output_change, "output unit^2",
          "||X dW_k^T||^2 of sequence s, from +-1 probes");
  dataset("weighted_change", scores.weighted_change, "nat^2",
          "tr(dW_k X^T D X dW_k^T) of sequence s, D the mean over output channels, from +-1 probes");
  dataset("gradient_norm", scores.gradient_norm, "nat^2 per weight unit^2",
          "||G^T X||^2 of sequence s, draw r");
  dataset("weight_change", scores.weight_change, "weight unit^2", "||dW_k||^2");
  file.attribute(group, "rounding",
                 scores.is_solved ? "as in quantized checkpoints" : "to nearest, without importance");
  file.attribute(group, "group", scores.grid.group);
  file.attribute(group, "symmetric", int64_t{scores.grid.symmetric});
  file.attribute(group, "clip_search", int64_t{scores.grid.clip_search});
  file.attribute(group, "storage", c10::toString(scores.grid.storage));
}

int64_t integer_attribute(const io::Hdf5Reader& file, const std::string& object, const std::string& name) {
  const io::Attribute value = file.attribute(object, name);
  if (const auto* integer = std::get_if<int64_t>(&value)) return *integer;
  fail<DataError>("expected an integer in attribute {} of {}, found another type", name, object);
}

}  // namespace

std::filesystem::path statistics_path(const std::filesystem::path& directory, int64_t block) {
  return directory / fmt::format("block-{:05d}.h5", block);
}

void write_statistics(const std::filesystem::path& directory, int64_t block, const StatisticsHeader& header,
                      const BlockStatistics& statistics) {
  io::Hdf5Writer file(statistics_path(directory, block));
  for (const auto& [name, value] : header) file.attribute("/", name, value);
  file.attribute("/", "block", block);
  for (int p = 0; p < model::kProjections; ++p) {
    const ModuleStatistics& module = statistics[static_cast<size_t>(p)];
    const std::string group = group_of(p);
    const auto dataset = [&](const std::string& name, const at::Tensor& tensor, const std::string& unit,
                             const std::string& equation) {
      if (!tensor.defined()) return;
      file.write(group + "/" + name, tensor);
      file.attribute(group + "/" + name, "unit", unit);
      file.attribute(group + "/" + name, "equation", equation);
    };
    dataset("token_weights", module.token_weights, "nat^2 per output unit^2",
            "D[s,i,k] = mean over output channels j of row group k of (dL/dY_ij)^2");
    dataset("sum_x2", module.sum_x2, "activation^2", "sum_i x_ij^2");
    dataset("max_abs_x", module.max_abs_x, "activation", "max_i |x_ij|");
    dataset("alpha_per_token", module.alpha_per_token, "nat^2 per weight unit^2",
            "sum_i ||G_i||^2 x_ij^2 (activation sensitivity, eq. 6)");
    dataset("alpha_per_sequence", module.alpha_per_sequence, "nat^2 per weight unit^2",
            "sum_s ||G_s^T X_s,:j||^2 (activation sensitivity, eq. 5)");
    dataset("covariance", module.covariance, "nat^2 per weight unit^2",
            "H[k] = sum_i D[i,k] x_i x_i^T, raw D");
    if (module.row_groups.order.defined()) {
      std::vector<int64_t> sizes;
      for (const Range& range : module.row_groups.ranges) sizes.push_back(range.size());
      dataset("row_order", module.row_groups.order, "output channels",
              "the output channels, those of row group 0 first, ascending in each group");
      dataset("row_group_sizes", at::tensor(sizes, at::kLong), "output channels", "channels of row group k");
    }
    if (!module.perturbations.bits.empty()) write_perturbations(file, group, module.perturbations);
    file.attribute(group, "module", model::module_name(block, static_cast<model::Projection>(p)));
    file.attribute(group, "n_tokens", module.n_tokens);
    file.attribute(group, "n_sequences", module.n_sequences);
  }
  file.commit();
}

std::array<at::Tensor, model::kProjections> read_token_weights(const std::filesystem::path& directory,
                                                               int64_t block) {
  const io::Hdf5Reader file(statistics_path(directory, block));
  std::array<at::Tensor, model::kProjections> weights;
  for (int p = 0; p < model::kProjections; ++p)
    weights[static_cast<size_t>(p)] = file.read(group_of(p) + "/token_weights");
  return weights;
}

std::array<sensitivity::RowGroups, model::kProjections> read_row_groups(
    const std::filesystem::path& directory, int64_t block) {
  const auto path = statistics_path(directory, block);
  const io::Hdf5Reader file(path);
  std::array<sensitivity::RowGroups, model::kProjections> result;
  for (int p = 0; p < model::kProjections; ++p) {
    const std::string group = group_of(p);
    if (!file.contains(group + "/row_order") || !file.contains(group + "/row_group_sizes"))
      fail<DataError>(
          "{}: expected {}/row_order and row_group_sizes of clustered row groups, found none; `isobath "
          "measure` "
          "with sensitivity.grouping: cluster leaves them",
          path.string(), group);
    sensitivity::RowGroups& groups = result[static_cast<size_t>(p)];
    groups.order = file.read(group + "/row_order").to(at::kLong).contiguous();
    const at::Tensor sizes = file.read(group + "/row_group_sizes").to(at::kLong);
    const bool is_permutation =
        groups.order.dim() == 1 &&
        at::equal(std::get<0>(groups.order.sort()), at::arange(groups.order.numel(), at::kLong));
    if (!is_permutation || sizes.dim() != 1 || sizes.numel() == 0 || sizes.min().item<int64_t>() < 1 ||
        sizes.sum().item<int64_t>() != groups.order.numel())
      fail<DataError>(
          "{}: {}: expected each output channel once in row_order, and row_group_sizes that add up "
          "to their number",
          path.string(), group);
    int64_t begin = 0;
    for (int64_t k = 0; k < sizes.numel(); ++k) {
      groups.ranges.push_back({begin, begin + sizes[k].item<int64_t>()});
      begin = groups.ranges.back().end;
    }
  }
  return result;
}

std::array<ModuleScores, model::kProjections> read_perturbations(const std::filesystem::path& directory,
                                                                 int64_t block) {
  const auto path = statistics_path(directory, block);
  const io::Hdf5Reader file(path);
  std::array<ModuleScores, model::kProjections> result;
  for (int p = 0; p < model::kProjections; ++p) {
    ModuleScores& module = result[static_cast<size_t>(p)];
    module.n_tokens = integer_attribute(file, group_of(p), "n_tokens");
    const std::string group = group_of(p) + "/perturbations";
    if (!file.contains(group)) continue;
    const auto read = [&](const std::string& name, at::IntArrayRef shape) {
      at::Tensor values = file.read(group + "/" + name);
      const bool fits =
          values.dim() == std::ssize(shape) &&
          std::equal(shape.begin(), shape.end(), values.sizes().begin(),
                     [](int64_t expected, int64_t found) { return expected < 0 || expected == found; });
      if (!fits)
        fail<DataError>("{}: {}/{}: expected shape {}, found {} (-1: any)", path.string(), group, name,
                        fmt::join(shape, " x "), fmt::join(values.sizes(), " x "));
      return values;
    };
    const at::Tensor bits = read("bits", {-1}).to(at::kLong).contiguous();
    const int64_t n_widths = bits.size(0);
    Perturbations& scores = module.perturbations;
    scores.bits.assign(bits.const_data_ptr<int64_t>(), bits.const_data_ptr<int64_t>() + n_widths);
    scores.first_order = read("first_order", {-1, -1, n_widths}).to(at::kDouble);
    const int64_t n = scores.first_order.size(0), samples = scores.first_order.size(1);
    scores.output_change = read("output_change", {n, n_widths}).to(at::kDouble);
    scores.weighted_change = read("weighted_change", {n, n_widths}).to(at::kDouble);
    scores.gradient_norm = read("gradient_norm", {n, samples}).to(at::kDouble);
    scores.weight_change = read("weight_change", {n_widths}).to(at::kDouble);
    scores.grid.group = integer_attribute(file, group, "group");
    scores.grid.symmetric = integer_attribute(file, group, "symmetric") != 0;
    scores.grid.clip_search = integer_attribute(file, group, "clip_search") != 0;
  }
  return result;
}

void require_header(const std::string& who, const std::filesystem::path& directory,
                    const StatisticsHeader& expected, int64_t n_blocks) {
  std::string differences;
  for (int64_t block = 0; block < n_blocks; ++block) {
    const auto path = statistics_path(directory, block);
    if (!std::filesystem::exists(path))
      fail<ConfigError>(
          "{}: {} is missing; expected a finished measure/ directory with {} block files; `isobath measure` "
          "makes "
          "it",
          who, path.string(), n_blocks);
  }
  for (int64_t block = 0; block < n_blocks; ++block) {
    const io::Hdf5Reader file(statistics_path(directory, block));
    for (const auto& [name, value] : expected) {
      std::string found = "(absent)";
      if (file.has_attribute("/", name)) {
        const io::Attribute attribute = file.attribute("/", name);
        if (const auto* text = std::get_if<std::string>(&attribute)) found = *text;
      }
      if (found != value)
        differences += fmt::format("\n  {}: this run has {}, the statistics have {}", name, value, found);
    }
    if (!differences.empty())
      fail<ConfigError>(
          "{}: the statistics in {} were measured differently:{}{}\n`isobath measure` with this run's "
          "configuration makes statistics that fit it",
          who, directory.string(), block == 0 ? "" : fmt::format(" (those of block {})", block), differences);
  }
}

}  // namespace isobath::pipeline
