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

/// What one score belongs to, below and above a module.
enum class Granularity { weight, channel, block };

struct PartsRequest {
  Granularity by = Granularity::channel;
  int64_t n_rows = 20;  ///< the most sensitive ones
  bool as_json = false;
  std::filesystem::path model = {};  ///< weight: directory of the model that was measured
};

/// The most sensitive weights, channels or blocks of such statistics, as a table or as JSON, per token.
///
/// block    Σα⁽⁶⁾ of its linears, nat² per weight unit²
/// channel  α⁽⁶⁾_j = Σ_i ‖G_i‖² x_ij², nat² per weight unit²
/// weight   ½ H_jj w_kj², H_jj = α⁽⁶⁾_j / d_out: nats that removing it alone costs to second order (OBD), the
///          gradient of a token taken for isotropic over the output channels
///
/// Cost     weight: reads every linear's weights once, one at a time. Local. Throws DataError when there are
/// no statistics, or they are of another model than `model`; IoError. Source   activation sensitivity, §4.3;
/// LeCun, Denker & Solla (1990).
[[nodiscard]] std::string inspect_parts(const std::filesystem::path& path, const PartsRequest& request);

}  // namespace isobath::cli
