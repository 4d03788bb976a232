#include "quantize_summary.hpp"

namespace isobath::pipeline {

using model::Projection;

nlohmann::json to_json(const ModuleRecord& record) {
  nlohmann::json json = {{"module", record.module},
                         {"bits", record.bits},
                         {"group", record.group},
                         {"weighting", record.weighting},
                         {"damping", record.damping},
                         {"fallbacks", record.n_fallbacks},
                         {"effective_samples_per_channel", record.effective_samples_per_channel},
                         {"objective_round_to_nearest", record.objective_rounded},
                         {"objective", record.objective},
                         {"bits_per_weight", record.bits_per_weight}};
  if (record.objective_asymmetric) json["objective_asymmetric"] = *record.objective_asymmetric;
  if (record.n_sweeps > 0) json["sweeps"] = record.n_sweeps;
  if (record.shrinkage > 0) json["shrinkage"] = record.shrinkage;
  return json;
}

BlockRecord block_record(int64_t block, const std::vector<ModuleRecord>& linears) {
  BlockRecord record{.block = block};
  for (const ModuleRecord& linear : linears) {
    record.objective_rounded += linear.objective_rounded;
    record.objective += linear.objective;
  }
  return record;
}

nlohmann::json to_json(const BlockRecord& record) {
  nlohmann::json json = {{"block", record.block},
                         {"objective_round_to_nearest", record.objective_rounded},
                         {"objective", record.objective}};
  if (record.deviation) json["deviation"] = *record.deviation;
  if (record.loss) {
    json["nll_per_token"] = record.loss->nll_per_token;
    if (record.loss->kl_per_token) json["kl_per_token"] = *record.loss->kl_per_token;
  }
  return json;
}

quant::GridSpec grid_of(const Session& session, const config::ModuleChoice& choice) {
  const config::Quantization& quantization = session.config.quantization;
  return {.bits = choice.bits,
          .group = choice.group,
          .symmetric = quantization.symmetric,
          .clip_search = quantization.clip_search,
          .storage = session.model().dtype};
}

OutputModules output_modules(const Session& session) {
  OutputModules output{.grids = {}, .ignored = {"lm_head"}, .result = {}};
  double bits = 0, n_weights = 0;
  for (int64_t block = 0; block < session.model().n_blocks; ++block) {
    for (int p = 0; p < model::kProjections; ++p) {
      const auto projection = static_cast<Projection>(p);
      const std::string module = model::module_name(block, projection);
      const auto choice = config::choice_for(session.config.quantization, module);
      if (!choice.quantized) {
        output.ignored.push_back(module);
        continue;
      }
      output.grids[module] = grid_of(session, choice);
      const model::ModuleShape shape = model::module_shape(session.model(), projection);
      const double n = static_cast<double>(shape.rows) * static_cast<double>(shape.columns);
      bits += n * quant::bits_per_weight(shape.columns, output.grids[module]);
      n_weights += n;
      ++output.result.n_modules;
      ++output.result.modules_of_width[choice.bits];
    }
  }
  output.result.bits_per_weight = n_weights > 0 ? bits / n_weights : 0;
  return output;
}

}  // namespace isobath::pipeline
