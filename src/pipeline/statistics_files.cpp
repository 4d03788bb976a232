#include <isobath/pipeline/statistics_files.hpp>

#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>

namespace isobath::pipeline {
namespace {

std::string group_of(int projection) {
  return std::string(model::name_of(static_cast<model::Projection>(projection)));
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

void require_header(const std::filesystem::path& directory, const StatisticsHeader& expected,
                    int64_t n_blocks) {
  std::string differences;
  for (int64_t block = 0; block < n_blocks; ++block) {
    const auto path = statistics_path(directory, block);
    if (!std::filesystem::exists(path))
      fail<ConfigError>(
          "sensitivity.reuse: {} is missing; expected a finished measure/ directory with {} block files",
          path.string(), n_blocks);
  }
  const io::Hdf5Reader file(statistics_path(directory, 0));
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
    fail<ConfigError>("sensitivity.reuse: the statistics in {} were measured differently:{}",
                      directory.string(), differences);
}

}  // namespace isobath::pipeline
