#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace isobath::config {

struct Ranks {
  int stages = 0;               ///< 0: auto
  int replicas = 0;             ///< 0: auto
  int threads = 0;              ///< per rank; 0: auto
  std::string device = "auto";  ///< auto | cpu | cuda
  double activation_gib = 1.0;  ///< activations kept for the backward pass
  int64_t watchdog_s = 600;     ///< seconds a rank may wait for others; 0: for ever
};
struct Scratch {
  std::string directory;    ///< empty: block inputs stay in memory
  double memory_gib = 4.0;  ///< of them that stay in memory all the same
};
struct Calibration {
  std::string tokens;
  int64_t sequences = 64, length = 1024, microbatch = 1, logical_shards = 16;
  uint64_t seed = 0;
};
struct Sensitivity {
  std::string loss = "nll";             ///< nll | fisher
  int64_t samples = 1;                  ///< label draws per token (fisher)
  std::string per_sequence = "probes";  ///< how α of equation 5 is had: off | probes | exact
  int64_t probes = 8;
  int64_t row_groups = 1;
  std::string grouping = "index";  ///< of row groups: index | head | cluster
  int64_t grouping_sequences = 8;  ///< cluster: sequences that row profiles are measured on
  double clip_quantile = 0.999;
  double exponent = 0.5;
  double shrinkage = 0;  ///< 0 … 1; −1: auto
  bool covariance = false;
  std::vector<int> gram_bits;  ///< widths whose perturbations are scored while measuring; empty: none
  /// Quantized checkpoints whose weights are those perturbations, one a width; empty: rounded to nearest.
  std::vector<std::string> gram_checkpoints;
  std::string reuse;  ///< finished measure/ directory of another run to use instead of measuring
};
struct Override {
  std::string match;   ///< module name, or "re:" + ECMAScript regular expression matched from the start
  int bits = 0;        ///< 0: not overridden
  int64_t group = -1;  ///< −1: not overridden; 0: channel
};
struct Asymmetric {
  std::string correction = "qep";  ///< none | qep | gptaq
  double strength = 0.5;           ///< a of W + a·W·M
  double ridge = 1.0;              ///< λ of qep, in mean diagonals of H
  double residual = 1.0;           ///< ρ of qep: share of the residual stream's deviation in the target
  [[nodiscard]] bool is_on() const { return correction != "none"; }
};
struct Tuning {
  int64_t epochs = 0;   ///< passes over the calibration tokens that tune scales; 0: none
  int64_t steps = 8;    ///< of an epoch
  double rate = 0.004;  ///< of the first step, relative change of a scale
};
struct Reestimate {
  std::string policy = "never";  ///< never | every | drift
  int64_t blocks = 5;            ///< between two measurements (every) or checks (drift)
  std::string loss = "same";     ///< same (as sensitivity.loss) | nll | fisher | kl
  double threshold = 0.95;       ///< drift: cosine of D below which it is measured again
  int64_t probe_sequences = 8;   ///< that drift compares D on, and whose divergence is tracked
  bool track = false;            ///< the divergence behind every block
};
struct Refinement {
  int64_t sweeps = 2;  ///< 0: off
};
/// Content of an allocation file (config/allocation_file.hpp).
struct Allocation {
  std::map<std::string, int> bits;                ///< by whole module name
  std::map<std::string, std::string> provenance;  ///< model, tokens, loss, method, budget …
  std::string digest;                             ///< of the file's text; empty: no file
};
struct Quantization {
  std::string solver = "gptq";            ///< gptq | round_to_nearest
  std::string weighting = "sensitivity";  ///< sensitivity | none
  int bits = 3;
  int64_t group = 64;  ///< 0: channel
  bool symmetric = true, clip_search = true;
  std::string act_order = "none";  ///< none | static
  double damping = 0.1;
  Refinement refinement;
  Asymmetric asymmetric;
  Reestimate reestimate;
  Tuning tuning;
  std::vector<std::string> ignore = {"lm_head"};
  std::vector<Override> overrides;
  std::string allocation;  ///< file of `isobath allocate`; empty: none
  Allocation allocated;    ///< its content, once apply_allocation has read it
  /// Whether the hidden states of the original model travel beside those of the quantized prefix.
  [[nodiscard]] bool is_asymmetric() const { return solver != "round_to_nearest" && asymmetric.is_on(); }
  /// Whether linears that are added to the residual stream make up for what that lacks.
  [[nodiscard]] bool corrects_residual() const {
    return is_asymmetric() && asymmetric.correction == "qep" && asymmetric.residual > 0;
  }
};
struct Evaluation {
  std::string tokens;  ///< empty: the stage is skipped
  int64_t window = 2048, windows = 40;
};
struct Checkpoint {
  int64_t every_blocks = 0;  ///< 0: auto
  int64_t keep = 2;
};
struct Planning {
  std::string cluster;  ///< cluster description to compare the run's cost with; empty: none
};

/// One run, parsed, complete and immutable.
struct RunConfig {
  std::string model, output;
  std::string compute_dtype = "auto";  ///< auto | bfloat16 | float32
  std::string residency = "auto";      ///< auto | resident | streamed
  std::string format = "compressed-tensors";
  Ranks ranks;
  Scratch scratch;
  Calibration calibration;
  Sensitivity sensitivity;
  Quantization quantization;
  Evaluation evaluation;
  Checkpoint checkpoint;
  Planning plan;

  /// Every key in order with its value as text, for fingerprints, provenance and `check`.
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> flatten() const;
};

/// Parses YAML text; `overrides` are "dotted.key=value" (value is YAML). `source` names the file in messages.
/// Strict: an unknown key, a wrong type or a value out of range is a ConfigError naming source, line, key,
/// what was expected and found, and the nearest known key.
[[nodiscard]] RunConfig parse(const std::string& yaml, const std::vector<std::string>& overrides,
                              const std::string& source);

/// Whether a pattern of `ignore` or `overrides` means this module: its whole name, or re: and an ECMAScript
/// regular expression that matches from the start of the name.
[[nodiscard]] bool matches(const std::string& pattern, const std::string& module);

/// Bits and group of one module after the allocation, `overrides` (which win over it) and `ignore`.
struct ModuleChoice {
  bool quantized = true;
  int bits = 0;
  int64_t group = 0;
};
[[nodiscard]] ModuleChoice choice_for(const Quantization& quantization, const std::string& module);

}  // namespace isobath::config
