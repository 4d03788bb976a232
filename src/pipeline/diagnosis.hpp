#pragma once
#include <ATen/core/Tensor.h>

#include <isobath/model/model_config.hpp>
#include <isobath/pipeline/diagnose.hpp>
#include <optional>
#include <string>
#include <vector>

/// What `diagnose` gathers, and what is made of it. Internal to the module.
namespace isobath::pipeline {

/// Linears whose weights are replaced together.
struct DiagnosedPart {
  int64_t block = 0;
  std::vector<model::Projection> projections;
  std::string name;  ///< "model.layers.3.mlp.down_proj", or "block 3"
};

/// Changes that a measured part makes, summed over a sequence's predicted tokens.
enum MeasuredColumn : int64_t { kKl, kKlOfTenth, kNllChange, kMeasuredColumns };

struct Diagnosis {
  std::vector<DiagnosedPart> modules;   ///< M: all quantized linears
  std::vector<DiagnosedPart> measured;  ///< N: those of them that are measured, then the blocks
  std::vector<int64_t> module_of;       ///< [N] place in modules; −1 for a block
  // By sequence of the probe set, f64, replicated.
  at::Tensor n_tokens;         ///< [n] predicted tokens
  at::Tensor first_order;      ///< [n, M] ⟨G, X ΔWᵀ⟩ with the data's labels
  at::Tensor fisher;           ///< [n, samples, M] the same with labels drawn from the model
  at::Tensor weighted_change;  ///< [n, M] Σ_i D_i ‖ΔW x_i‖², D of drawn labels, mean over the draws
  at::Tensor changes;          ///< [n, N, kMeasuredColumns]
  // By linear.
  std::vector<std::optional<double>> cross_token_mass;  ///< [M] 1 − Σα⁽⁶⁾/Σα⁽⁵⁾ of the statistics
  std::vector<std::optional<double>> effective_per_channel;  ///< [M] n_eff/d of the solve
};

/// Table, and JSON text, of what a diagnosis says. Local.
struct DiagnosisReport {
  std::string table, json;
};
[[nodiscard]] DiagnosisReport report_of(const Diagnosis& diagnosis, const DiagnoseRequest& request);

}  // namespace isobath::pipeline
