#pragma once
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <isobath/io/hdf5_file.hpp>
#include <string>
#include <vector>

namespace isobath::cli {

/// Statistics files that `path` stands for: itself, or the block files of a measure/ or run directory, in
/// order. Throws DataError when there are none.
[[nodiscard]] std::vector<std::filesystem::path> block_files(const std::filesystem::path& path);

/// An attribute as text; "unknown" when it is absent.
[[nodiscard]] std::string text_of(const io::Hdf5Reader& file, const std::string& object,
                                  const std::string& name);
/// Throws DataError for another type.
[[nodiscard]] int64_t integer_of(const io::Hdf5Reader& file, const std::string& object,
                                 const std::string& name, const std::filesystem::path& path);

/// What one linear's statistics say of its input channels.
struct ChannelValues {
  at::Tensor alpha;      ///< [d_in] f64, α of [AS 6], Σ over tokens
  at::Tensor max_abs_x;  ///< [d_in]
};
/// Throws DataError for other shapes.
[[nodiscard]] ChannelValues read_channels(const io::Hdf5Reader& file, const std::string& group,
                                          const std::filesystem::path& path);

}  // namespace isobath::cli
