#pragma once
#include <ATen/core/Tensor.h>
#include <fmt/format.h>

#include <filesystem>
#include <isobath/allocate/quadratic.hpp>
#include <isobath/config/run_config.hpp>
#include <isobath/model/model_config.hpp>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace isobath::pipeline {

/// The linears of a block that an engine loads as one matrix, and the widths they may take together.
struct FusedSet {
  int64_t block = 0;
  int input_set = 0;
  std::vector<std::string> modules;
  std::vector<int64_t> bits;  ///< of its candidates
  int64_t n_weights = 0;
  [[nodiscard]] std::string name() const {
    return fmt::format("block {}, {}", block, model::name_of_input_set(input_set));
  }
};

/// What statistics and configuration say of the choice of widths. Candidates are flat, set by set.
struct AllocationProblem {
  std::vector<FusedSet> sets;
  allocate::Candidates candidates;
  allocate::Scores scores;
  std::map<std::string, std::vector<double>>
      scored;  ///< method -> [n] additive score, nats per token or its own unit
  int64_t n_weights = 0;

  [[nodiscard]] int64_t bits_of(size_t set, int64_t candidate) const {
    return sets[set].bits[static_cast<size_t>(candidate - candidates.first[set])];
  }
  [[nodiscard]] double mean_bits(int64_t cost) const {
    return static_cast<double>(cost) / static_cast<double>(n_weights);
  }
};

/// Reads the scores of all blocks. Local. Throws as `allocate` says.
[[nodiscard]] AllocationProblem read_problem(const config::RunConfig& config, const model::ModelConfig& model,
                                             const std::filesystem::path& statistics);

/// A method's choice within the budget.
struct Allocation {
  std::string method;
  allocate::Selection selection;
  double predicted = 0;  ///< of the quadratic loss, nats per token
  double additive = 0;   ///< of its diagonal alone
  /// Loss on sequences that the choice was not fitted to (allocate::held_out_loss); of methods that fit
  /// nothing to the scores s, the loss estimated from all sequences without the prior.
  std::optional<double> held_out;
};

/// All that is told of one call of `allocate`.
struct AllocationReport {
  const AllocationProblem& problem;
  const allocate::QuadraticLoss& loss;
  std::vector<Allocation> methods;    ///< in the order of allocation_methods()
  std::optional<Allocation> uniform;  ///< the widest single width that fits; none when no width does
  double bound = 0;                   ///< of every selection's predicted loss
  size_t chosen = 0;                  ///< index of methods
};
[[nodiscard]] std::string allocation_table(const AllocationReport& report);
/// provenance: text fields that go in front.
[[nodiscard]] std::string allocation_json(const AllocationReport& report,
                                          const std::map<std::string, std::string>& provenance);

}  // namespace isobath::pipeline
