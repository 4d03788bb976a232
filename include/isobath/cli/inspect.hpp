#pragma once
#include <cstdint>
#include <filesystem>
#include <string>

namespace isobath::cli {

/// Modules of a statistics file, or of all block files of a directory (`measure/`, or a run directory that
/// holds one), by falling sensitivity Σ_j α⁽⁶⁾_j / n_tokens, as a table of the first `n_rows`.
///
/// Local. Throws DataError when there are no statistics, IoError.
/// Source   activation sensitivity, eqs. 5 and 6; effective samples (ΣD)² / ΣD².
[[nodiscard]] std::string inspect_table(const std::filesystem::path& path, int64_t n_rows);
/// The same numbers of all modules as JSON text.
[[nodiscard]] std::string inspect_json(const std::filesystem::path& path);

}  // namespace isobath::cli
