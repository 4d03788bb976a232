#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <filesystem>
#include <isobath/model/model_config.hpp>
#include <isobath/quant/grid.hpp>
#include <isobath/sensitivity/row_clusters.hpp>
#include <map>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// What rounding one linear to each of K widths would do, sequence by sequence
/// (sensitivity/perturbation.hpp). Weights are rounded to nearest on `grid`, as quant::round_to_nearest does
/// without importance, or as quantized checkpoints have them.
struct Perturbations {
  std::vector<int64_t> bits;  ///< [K] ascending; empty: not scored
  quant::GridSpec grid;       ///< group, symmetric, clip_search, storage of all widths; its bits are not used
  bool is_solved = false;     ///< as quantized checkpoints have them
  at::Tensor first_order;     ///< [n, samples, K] f64  s = <G, X dW^T>
  at::Tensor output_change;   ///< [n, K] f64  ||X dW^T||^2 (probes)
  at::Tensor weighted_change;  ///< [n, K] f64  tr(dW X^T D X dW^T) (probes), D of the whole linear
  at::Tensor gradient_norm;    ///< [n, samples] f64  ||G^T X||^2
  at::Tensor weight_change;    ///< [K] f64  ||dW||^2
};

/// Statistics of one linear over the whole calibration set.
struct ModuleStatistics {
  at::Tensor token_weights;           ///< [n, T, row_groups] f32: D, raw (no clipping)
  at::Tensor sum_x2;                  ///< [d_in] f64
  at::Tensor max_abs_x;               ///< [d_in] f32
  at::Tensor alpha_per_token;         ///< [d_in] f64, α of [AS 6]
  at::Tensor alpha_per_sequence;      ///< [d_in] f64, α of [AS 5]; undefined when switched off
  at::Tensor covariance;              ///< [row_groups, d_in, d_in] f32 with raw D; undefined unless asked for
  Perturbations perturbations;        ///< only with sensitivity.gram.bits
  sensitivity::RowGroups row_groups;  ///< of D and H; only those with an order are written
  int64_t n_tokens = 0;
  int64_t n_sequences = 0;
};
using BlockStatistics = std::array<ModuleStatistics, model::kProjections>;

/// Text attributes of the root group: model, loss, … the same in every block's file.
using StatisticsHeader = std::map<std::string, std::string>;

/// `directory`/block-00007.h5: one self-describing file a block, readable with h5py. The layout is in
/// docs/formats.md.
[[nodiscard]] std::filesystem::path statistics_path(const std::filesystem::path& directory, int64_t block);

/// Writes a block's file atomically. Local. Throws IoError.
void write_statistics(const std::filesystem::path& directory, int64_t block, const StatisticsHeader& header,
                      const BlockStatistics& statistics);

/// Token weights of a block's seven linears, [n, T, row_groups] each. Local. Throws DataError or IoError.
[[nodiscard]] std::array<at::Tensor, model::kProjections> read_token_weights(
    const std::filesystem::path& directory, int64_t block);

/// Row groups of a block's seven linears that were measured in clusters. Local. Throws IoError, or DataError
/// where a file holds none or an order that is no permutation.
[[nodiscard]] std::array<sensitivity::RowGroups, model::kProjections> read_row_groups(
    const std::filesystem::path& directory, int64_t block);

/// What `isobath allocate` needs of a block's seven linears; those without scores have no bits.
struct ModuleScores {
  Perturbations perturbations;
  int64_t n_tokens = 0;
};
/// Local. Throws DataError or IoError.
[[nodiscard]] std::array<ModuleScores, model::kProjections> read_perturbations(
    const std::filesystem::path& directory, int64_t block);

/// Compares the header of every file of a finished statistics directory with `expected`; throws ConfigError
/// naming each difference with both values and what makes statistics that fit; `who` begins the message.
/// Local.
void require_header(const std::string& who, const std::filesystem::path& directory,
                    const StatisticsHeader& expected, int64_t n_blocks);

}  // namespace isobath::pipeline
