#include "statistics_path.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <isobath/core/error.hpp>

namespace isobath::cli {

namespace fs = std::filesystem;

std::vector<fs::path> block_files(const fs::path& path) {
  if (!fs::exists(path))
    fail<DataError>("{}: expected a statistics file or directory, found nothing", path.string());
  if (!fs::is_directory(path)) return {path};
  const fs::path directory = fs::is_directory(path / "measure") ? path / "measure" : path;
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("block-") && name.ends_with(".h5")) files.push_back(entry.path());
  }
  if (files.empty())
    fail<DataError>(
        "{}: expected statistics files block-00000.h5 and on, found none; run `isobath measure` first",
        directory.string());
  std::sort(files.begin(), files.end());
  return files;
}

std::string text_of(const io::Hdf5Reader& file, const std::string& object, const std::string& name) {
  if (!file.has_attribute(object, name)) return "unknown";
  const io::Attribute value = file.attribute(object, name);
  if (const auto* text = std::get_if<std::string>(&value)) return *text;
  if (const auto* integer = std::get_if<int64_t>(&value)) return std::to_string(*integer);
  if (const auto* real = std::get_if<double>(&value)) return fmt::format("{}", *real);
  return fmt::format("{}", fmt::join(std::get<std::vector<std::string>>(value), ", "));
}

int64_t integer_of(const io::Hdf5Reader& file, const std::string& object, const std::string& name,
                   const fs::path& path) {
  const io::Attribute value = file.attribute(object, name);
  if (const auto* integer = std::get_if<int64_t>(&value)) return *integer;
  fail<DataError>("{}: expected an integer in attribute {} of {}, found another type", path.string(), name,
                  object);
}

ChannelValues read_channels(const io::Hdf5Reader& file, const std::string& group, const fs::path& path) {
  ChannelValues values{file.read(group + "/alpha_per_token").to(at::kDouble),
                       file.read(group + "/max_abs_x")};
  if (values.alpha.dim() != 1 || values.alpha.numel() == 0 ||
      values.max_abs_x.sizes() != values.alpha.sizes())
    fail<DataError>(
        "{}: {}: expected alpha_per_token and max_abs_x with one value a channel, found {} and {} values",
        path.string(), group, values.alpha.numel(), values.max_abs_x.numel());
  return values;
}

}  // namespace isobath::cli
