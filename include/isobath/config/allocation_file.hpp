#pragma once
#include <isobath/config/run_config.hpp>
#include <map>
#include <string>

namespace isobath::config {

/// The file that `isobath allocate` leaves and `quantization.allocation` names, YAML:
///
///   allocation: {model: …, tokens: …, loss: nll, method: quadratic, …}     provenance, text
///   overrides:                                                             the form of
///   quantization.overrides
///   - {match: model.layers.0.self_attn.q_proj, bits: 3}                    whole module names only
[[nodiscard]] std::string allocation_text(const std::map<std::string, int>& bits,
                                          const std::map<std::string, std::string>& provenance);

/// Reads such a text into quantization.allocated. `source` names the file in messages.
/// Throws ConfigError for anything that is not of this form: source, entry, what was expected and found.
void apply_allocation(RunConfig& config, const std::string& yaml, const std::string& source);

}  // namespace isobath::config
