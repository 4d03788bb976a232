#pragma once
#include <cstdint>
#include <filesystem>
#include <string>

namespace isobath::cli {

/// How far the statistics of one linear differ between two directories, of one model, measured on other
/// tokens, with another loss or behind a quantized prefix: cosines of the channels' E x² and α⁽⁶⁾, ratio of
/// Σα⁽⁶⁾ a token (second over first), and, when both hold the same tokens, the cosine of D. `n_rows` of them
/// as a table, the least alike first. Each path as in `inspect`.
///
/// Local. Throws DataError when a path holds no statistics, or the two are of other models or linears.
/// Source   METHOD §7 (f): calibration mismatch.
[[nodiscard]] std::string compare_table(const std::filesystem::path& first,
                                        const std::filesystem::path& second, int64_t n_rows);
/// The same of all linears as JSON text.
[[nodiscard]] std::string compare_json(const std::filesystem::path& first,
                                       const std::filesystem::path& second);

}  // namespace isobath::cli
