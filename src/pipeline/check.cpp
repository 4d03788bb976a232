#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <isobath/data/shards.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/model/balance.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <isobath/pipeline/run.hpp>
#include <isobath/pipeline/schedule.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <isobath/pipeline/validate.hpp>
#include <isobath/plan/plan.hpp>
#include <isobath/quant/grid.hpp>
#include <set>

namespace isobath::pipeline {

namespace {

// Engines load the linears of an input set as one matrix.
std::string split_sets(const config::RunConfig& config, const model::ModelConfig& model) {
  std::string lines;
  for (int64_t block = 0; block < model.n_blocks && lines.empty(); ++block)
    for (int set = 0; set < model::kInputSets; ++set) {
      std::set<std::string> choices;
      for (const model::Projection projection : model::input_set(set)) {
        const auto choice = config::choice_for(config.quantization, model::module_name(block, projection));
        choices.insert(choice.quantized ? fmt::format("{} bits, group {}", choice.bits, choice.group)
                                        : "not quantized");
      }
      if (choices.size() > 1)
        lines += fmt::format(
            "\n  block {}, {}: expected one choice, as engines load them as one matrix, found {}; change "
            "quantization.overrides or quantization.ignore",
            block, model::name_of_input_set(set), fmt::join(choices, "; "));
    }
  return lines;
}

// Patterns of ignore and overrides that no module has: a misspelt one would change nothing, silently.
std::string idle_patterns(const config::RunConfig& config, const model::ModelConfig& model) {
  std::vector<std::string> modules{"lm_head"};
  for (int64_t block = 0; block < model.n_blocks; ++block)
    for (int p = 0; p < model::kProjections; ++p)
      modules.push_back(model::module_name(block, static_cast<model::Projection>(p)));
  std::string lines;
  const auto require_match = [&](const char* key, const std::string& pattern) {
    for (const std::string& module : modules)
      if (config::matches(pattern, module)) return;
    lines += fmt::format(
        "\n  {}: \"{}\" matches no linear of the model; give a whole name, such as {}, or a pattern, such as "
        "re:.*\\.down_proj$",
        key, pattern, modules.back());
  };
  for (const std::string& pattern : config.quantization.ignore) require_match("quantization.ignore", pattern);
  for (const auto& entry : config.quantization.overrides)
    require_match("quantization.overrides", entry.match);
  return lines;
}

}  // namespace

void require_quantizable(const config::RunConfig& config, const model::ModelConfig& model) {
  std::string problems = idle_patterns(config, model) + split_sets(config, model);
  for (int64_t block = 0; block < model.n_blocks; ++block) {
    for (int set = 0; set < model::kInputSets; ++set) {
      for (const model::Projection projection : model::input_set(set)) {
        const std::string module = model::module_name(block, projection);
        const auto choice = config::choice_for(config.quantization, module);
        const model::ModuleShape shape = model::module_shape(model, projection);
        if (choice.quantized && choice.group > 0 && shape.columns % choice.group != 0)
          problems +=
              fmt::format("\n  {}: group {} does not divide its {} input channels; groups that do: {}",
                          module, choice.group, shape.columns, groups_that_divide(shape.columns));
      }
    }
    if (!problems.empty()) break;  // every block has the same shapes: one block's list is enough
  }
  problems += plan::too_wide_to_hold(config, model);
  if (config.sensitivity.row_groups > 1) {
    for (int p = 0; p < model::kProjections; ++p) {
      const auto projection = static_cast<model::Projection>(p);
      const model::ModuleShape shape = model::module_shape(model, projection);
      const bool by_head = config.sensitivity.grouping == "head";
      const int64_t unit = by_head ? model::rows_of_head(model, projection) : 1;
      if (config.sensitivity.row_groups > shape.rows / unit)
        problems += fmt::format("\n  sensitivity.row_groups = {} exceeds the {} {} of {}",
                                config.sensitivity.row_groups, shape.rows / unit,
                                unit > 1 ? "heads" : "output channels", model::name_of(projection));
    }
  }
  if (config.residency == "streamed" && config.quantization.tuning.epochs > 0)
    problems +=
        "\n  quantization.tuning passes through the whole model in every step, which residency: streamed "
        "would read "
        "from disk each time; give the run more ranks and residency: resident, or set "
        "quantization.tuning.epochs=0";
  if (config.quantization.reestimate.track && config.quantization.solver == "round_to_nearest")
    problems +=
        "\n  quantization.reestimate.track needs quantization.solver: gptq; found round_to_nearest, which "
        "sends "
        "no hidden states through the blocks";
  if (!problems.empty())
    fail<ConfigError>("the configuration does not fit the model {}:{}", config.model, problems);
}

void require_attended(const config::RunConfig& config, const model::ModelConfig& model) {
  if (!model.sliding_window) return;
  const auto require = [&](const char* key, int64_t length) {
    if (length > *model.sliding_window)
      fail<ConfigError>(
          "{}: expected at most {} tokens, the sliding window of {}, found {}; what a token sees "
          "behind a window is not modelled",
          key, *model.sliding_window, config.model, length);
  };
  require("calibration.length", config.calibration.length);
  if (!config.evaluation.tokens.empty()) require("evaluation.window", config.evaluation.window);
}

void require_allocated(const config::RunConfig& config, const model::CheckpointReader& source) {
  const config::Allocation& allocation = config.quantization.allocated;
  if (allocation.digest.empty()) return;
  const std::string file = "quantization.allocation: " + config.quantization.allocation;
  const auto made_for = allocation.provenance.find("model");
  const std::string fingerprint = source.tensors().fingerprint();
  if (made_for == allocation.provenance.end() || made_for->second != fingerprint)
    fail<ConfigError>(
        "{} was made for another model: expected {}, found {}; `isobath allocate` makes one for this", file,
        fingerprint, made_for == allocation.provenance.end() ? "no model" : made_for->second);
  std::set<std::string> unknown;
  for (const auto& [module, bits] : allocation.bits) unknown.insert(module);
  std::string problems;
  for (int64_t block = 0; block < source.config().n_blocks; ++block) {
    for (int p = 0; p < model::kProjections; ++p) {
      const std::string module = model::module_name(block, static_cast<model::Projection>(p));
      if (config::choice_for(config.quantization, module).quantized) unknown.erase(module);
    }
  }
  for (const std::string& module : unknown)
    problems += fmt::format("\n  {}: no linear of the model that this run quantizes", module);
  if (!problems.empty()) fail<ConfigError>("{}:{}", file, problems);
}

std::string groups_that_divide(int64_t columns) {
  std::string list;
  for (const int64_t group : {16, 32, 64, 96, 128, 192, 256, 512})
    if (columns % group == 0) list += fmt::format("{}{}", list.empty() ? "" : ", ", group);
  return list.empty() ? "channel" : list + ", channel";
}

CheckResult check(const config::RunConfig& config, int n_ranks) {
  CheckResult result;
  const auto attempt = [&](const auto& action) {
    try {
      action();
    } catch (const Error& error) {
      result.problems.emplace_back(error.what());
    }
  };
  attempt([&] {
    const model::CheckpointReader reader(config.model);
    const model::ModelConfig& model = reader.config();
    attempt([&] { require_quantizable(config, model); });
    attempt([&] { require_attended(config, model); });
    attempt([&] { require_allocated(config, reader); });
    double n_parameters = 0, bits = 0, n_quantized = 0;
    for (int64_t block = 0; block < model.n_blocks; ++block) {
      for (int p = 0; p < model::kProjections; ++p) {
        const auto projection = static_cast<model::Projection>(p);
        const model::ModuleShape shape = model::module_shape(model, projection);
        const double n = static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
        n_parameters += n;
        const auto choice = config::choice_for(config.quantization, model::module_name(block, projection));
        if (!choice.quantized) continue;
        n_quantized += n;
        bits += n * quant::bits_per_weight(shape.columns, {.bits = choice.bits,
                                                           .group = choice.group,
                                                           .symmetric = config.quantization.symmetric,
                                                           .storage = model.dtype});
      }
    }
    result.summary +=
        fmt::format("model      {}: {}, {} blocks, d_model {}, {:.1f} M weights in linears\n", config.model,
                    model.architecture, model.n_blocks, model.d_model, n_parameters / 1e6);
    if (n_quantized > 0)
      result.summary +=
          fmt::format("output     {:.3f} bits per quantized weight, {:.1f} MB in quantized linears\n",
                      bits / n_quantized, bits / 8e6);
    const data::ShardPlan shards(config.calibration.sequences, config.calibration.logical_shards,
                                 config.calibration.microbatch);
    attempt([&] {
      // Memory is left to `plan`: the ranks need not run on this machine.
      const model::Activations activations = kept_activations(config, choose_dtype(config, model, c10::kCPU));
      config::RunConfig chosen = config;
      const comm::GridShape grid =
          choose_shape(chosen, stage_costs(model, config.calibration.length, activations, n_ranks),
                       std::ssize(shards.microbatches()), n_ranks, /*bytes_per_rank=*/0);
      std::string text;
      for (const Range& range :
           model::balance_stages(model, config.calibration.length, grid.stages, activations))
        text += fmt::format(" [{}, {})", range.begin, range.end);
      result.summary += fmt::format("ranks      {} = stages {} x replicas {}; blocks of the stages:{}\n",
                                    n_ranks, grid.stages, grid.replicas, text);
    });
    const auto check_tokens = [&](const char* key, const std::string& path,
                                  const data::TokenRequirements& requirements) {
      if (path.empty()) return;
      attempt([&] {
        if (!std::filesystem::exists(path))
          fail<ConfigError>("{}: {} does not exist; tools/python/prepare_tokens.py makes token files", key,
                            path);
        (void)data::read_tokens(path, requirements);
      });
    };
    check_tokens("calibration.tokens", config.calibration.tokens, requirements_of(config, model));
    check_tokens("evaluation.tokens", config.evaluation.tokens, evaluation_requirements_of(config, model));
    result.summary +=
        fmt::format("tokens     {} sequences of {} = {} in {} logical shards, {} microbatches\n",
                    config.calibration.sequences, config.calibration.length,
                    config.calibration.sequences * config.calibration.length, shards.n_shards(),
                    shards.microbatches().size());
  });
  if (const std::string& path = config.sensitivity.reuse;
      !path.empty() && !std::filesystem::exists(statistics_path(path, 0)))
    result.problems.push_back(fmt::format(
        "sensitivity.reuse: {} holds no statistics; `isobath measure` leaves them in its output's measure/",
        path));
  if (const std::string& path = config.plan.cluster; !path.empty() && !std::filesystem::exists(path))
    result.problems.push_back(fmt::format(
        "plan.cluster: {} does not exist; `isobath plan --calibrate --output {}` makes it", path, path));
  return result;
}

}  // namespace isobath::pipeline
