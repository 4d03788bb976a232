#include "allocation_problem.hpp"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <cmath>
#include <isobath/core/error.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <isobath/quant/grid.hpp>
#include <set>

namespace isobath::pipeline {
namespace {

/// Width that quantization.overrides give to a module; 0: free.
int pinned_bits(config::Quantization quantization, const std::string& module) {
  quantization.bits = 0;
  quantization.allocated = {};
  return config::choice_for(quantization, module).bits;
}

void require_scores(const Perturbations& scores, const config::Quantization& quantization, int64_t group,
                    const std::string& module, const std::filesystem::path& file) {
  const std::string again =
      "measure again into another output: isobath measure CONFIG --set 'sensitivity.gram.bits=[2, 3, 4]' "
      "--set "
      "output=…";
  if (scores.bits.empty())
    fail<ConfigError>("{} holds no scores of widths for {}; {}", file.string(), module, again);
  const auto grid_text = [](int64_t columns, bool symmetric, bool clip_search) {
    return fmt::format("group {}, {}, {}", columns == 0 ? "channel" : std::to_string(columns),
                       symmetric ? "symmetric" : "asymmetric", clip_search ? "clip search" : "min-max");
  };
  const std::string asked = grid_text(group, quantization.symmetric, quantization.clip_search);
  const std::string found = grid_text(scores.grid.group, scores.grid.symmetric, scores.grid.clip_search);
  if (asked != found)
    fail<ConfigError>("{}: {} was scored on another grid than the configuration's: {}, not {}; {}",
                      file.string(), module, found, asked, again);
}

/// The widths a set may take: those scored for all its modules, or the one that overrides give.
std::vector<int64_t> widths_of(const FusedSet& set, const std::vector<const Perturbations*>& scores,
                               const config::Quantization& quantization, const std::filesystem::path& file) {
  std::set<int64_t> pinned;
  for (const std::string& module : set.modules)
    if (const int bits = pinned_bits(quantization, module); bits > 0) pinned.insert(bits);
  if (pinned.size() > 1)
    fail<ConfigError>(
        "quantization.overrides split {}: expected one width for {}, as engines load them as one matrix, "
        "found {}",
        set.name(), fmt::join(set.modules, ", "), fmt::join(pinned, ", "));
  for (const Perturbations* module : scores)
    if (module->bits != scores[0]->bits)
      fail<DataError>("{}: expected the same widths for all linears of {}, found {} and {}", file.string(),
                      set.name(), fmt::join(scores[0]->bits, ", "), fmt::join(module->bits, ", "));
  if (pinned.empty()) return scores[0]->bits;
  if (std::ranges::find(scores[0]->bits, *pinned.begin()) == scores[0]->bits.end())
    fail<ConfigError>(
        "quantization.overrides give {} bits to {}, but only {} were scored; measure with these bits in "
        "sensitivity.gram.bits",
        *pinned.begin(), set.name(), fmt::join(scores[0]->bits, ", "));
  return {*pinned.begin()};
}

/// Sums over the modules of each candidate as they are read.
class Builder {
 public:
  Builder(const config::RunConfig& config, const model::ModelConfig& model) : config_(config), model_(model) {
    problem_.candidates.first.push_back(0);
  }

  void add(FusedSet set, const std::vector<model::Projection>& projections,
           const std::vector<const ModuleScores*>& modules, const std::filesystem::path& file) {
    std::vector<const Perturbations*> scores;
    for (const ModuleScores* module : modules) scores.push_back(&module->perturbations);
    for (size_t m = 0; m < scores.size(); ++m)
      require_scores(*scores[m], config_.quantization,
                     config::choice_for(config_.quantization, set.modules[m]).group, set.modules[m], file);
    set.bits = widths_of(set, scores, config_.quantization, file);
    set_sizes(modules, file);
    for (const model::Projection projection : projections) {
      const model::ModuleShape shape = model::module_shape(model_, projection);
      set.n_weights += shape.rows * shape.columns;
    }
    for (const int64_t bits : set.bits) add_candidate(set, bits, projections, scores);
    problem_.n_weights += set.n_weights;
    problem_.candidates.first.push_back(problem_.candidates.size());
    problem_.scores.block.push_back(set.block);
    problem_.scores.kind.push_back(set.input_set);
    problem_.sets.push_back(std::move(set));
  }

  AllocationProblem finish() {
    if (!columns_.empty()) {
      problem_.scores.values = at::stack(columns_, 1);
      problem_.scores.prior = at::stack(weighted_, 1);
    }
    return std::move(problem_);
  }

 private:
  void set_sizes(const std::vector<const ModuleScores*>& modules, const std::filesystem::path& file) {
    for (const ModuleScores* module : modules) {
      const at::Tensor& s = module->perturbations.first_order;
      if (n_sequences_ == 0) {
        n_sequences_ = s.size(0);
        problem_.scores.samples = s.size(1);
        // The first token of a sequence is predicted by nothing.
        problem_.scores.tokens_per_sequence =
            static_cast<double>(module->n_tokens - s.size(0)) / static_cast<double>(s.size(0));
      }
      if (s.size(0) != n_sequences_ || s.size(1) != problem_.scores.samples ||
          problem_.scores.tokens_per_sequence <= 0)
        fail<DataError>(
            "{}: expected scores of {} sequences and {} draws with predicted tokens, found {} and {}",
            file.string(), n_sequences_, problem_.scores.samples, s.size(0), s.size(1));
    }
  }

  void add_candidate(const FusedSet& set, int64_t bits, const std::vector<model::Projection>& projections,
                     const std::vector<const Perturbations*>& scores) {
    double stored = 0, trace = 0, output = 0;
    at::Tensor s, weighted;
    const auto n = static_cast<double>(n_sequences_);
    for (size_t m = 0; m < scores.size(); ++m) {
      const Perturbations& p = *scores[m];
      const auto k = std::ranges::find(p.bits, bits) - p.bits.begin();
      const model::ModuleShape shape = model::module_shape(model_, projections[m]);
      quant::GridSpec spec = p.grid;
      spec.bits = static_cast<int>(bits);
      spec.storage = model_.dtype;
      const double n_weights = static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
      stored += n_weights * quant::bits_per_weight(shape.columns, spec);
      const at::Tensor column = p.first_order.select(2, k).reshape({-1});
      const at::Tensor by_sequence = p.weighted_change.select(1, k);
      s = s.defined() ? s + column : column.clone();
      weighted = weighted.defined() ? weighted + by_sequence : by_sequence.clone();
      // HAWQ-V2: mean eigenvalue of the Hessian (trace / n) times ||dW||²; the Fisher matrix's trace is
      // E||GᵀX||².
      trace += p.gradient_norm.mean().item<double>() / n_weights * p.weight_change[k].item<double>();
      output += p.output_change.select(1, k).sum().item<double>() / n;
    }
    if (!std::isfinite(s.sum().item<double>() + trace + output + weighted.sum().item<double>()))
      fail<DataError>("{} at {} bits: the scores are not finite; measure again", set.name(), bits);
    const double tokens = problem_.scores.tokens_per_sequence;
    problem_.candidates.cost.push_back(std::llround(stored));
    problem_.scored["hawq-v2"].push_back(0.5 * trace / tokens);
    problem_.scored["output"].push_back(output / tokens);
    problem_.scored["weighted"].push_back(0.5 * weighted.mean().item<double>() / tokens);
    problem_.scores.bits.push_back(bits);
    columns_.push_back(s);
    weighted_.push_back(weighted);
  }

  const config::RunConfig& config_;
  const model::ModelConfig& model_;
  AllocationProblem problem_;
  int64_t n_sequences_ = 0;
  // A candidate each: s [n_draws], E tr(ΔW XᵀDX ΔWᵀ) [n_sequences].
  std::vector<at::Tensor> columns_, weighted_;
};

}  // namespace

AllocationProblem read_problem(const config::RunConfig& config, const model::ModelConfig& model,
                               const std::filesystem::path& statistics) {
  Builder builder(config, model);
  for (int64_t block = 0; block < model.n_blocks; ++block) {
    const auto scores = read_perturbations(statistics, block);
    for (int input_set = 0; input_set < model::kInputSets; ++input_set) {
      FusedSet set{.block = block, .input_set = input_set, .modules = {}, .bits = {}, .n_weights = 0};
      std::vector<model::Projection> projections;
      std::vector<const ModuleScores*> modules;
      for (const model::Projection projection : model::input_set(input_set)) {
        const std::string module = model::module_name(block, projection);
        if (!config::choice_for(config.quantization, module).quantized) continue;
        set.modules.push_back(module);
        projections.push_back(projection);
        modules.push_back(&scores[static_cast<size_t>(projection)]);
      }
      if (!modules.empty())
        builder.add(std::move(set), projections, modules, statistics_path(statistics, block));
    }
  }
  AllocationProblem problem = builder.finish();
  if (problem.sets.empty()) fail<ConfigError>("quantization.ignore leaves no linear to choose a width for");
  return problem;
}

}  // namespace isobath::pipeline
