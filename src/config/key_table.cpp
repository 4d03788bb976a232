#include "key_builder.hpp"

namespace isobath::config {
namespace {

ordered_json pattern_schema() {
  return {{"type", "string"}, {"minLength", 1}};
}
ordered_json bits_schema() {
  return {{"enum", {2, 3, 4, 5, 6, 8}}};
}
ordered_json group_schema() {
  return {{"anyOf", {{{"enum", {"channel", 0}}}, {{"type", "integer"}, {"minimum", 16}, {"maximum", 4096}}}}};
}

std::string group_text(int64_t group) {
  return group == 0 ? "channel" : std::to_string(group);
}

std::string overrides_text(const std::vector<Override>& overrides) {
  ordered_json list = ordered_json::array();
  for (const Override& entry : overrides) {
    ordered_json item = {{"match", entry.match}};
    if (entry.bits != 0) item["bits"] = entry.bits;
    if (entry.group == 0) item["group"] = "channel";
    if (entry.group > 0) item["group"] = entry.group;
    list.push_back(std::move(item));
  }
  return list.dump();
}

void add_run_keys(Table& t) {
  t.text(
      "model", [](auto& c) -> auto& { return c.model; }, true, "Hugging Face model directory to quantize.");
  t.text(
      "output", [](auto& c) -> auto& { return c.output; }, true,
      "Run directory; it is created, and must be new unless the run in it is continued (--resume, "
      "--resume-or-start).");
  t.word(
      "compute_dtype", [](auto& c) -> auto& { return c.compute_dtype; }, {"auto", "bfloat16", "float32"},
      "Precision of activations and weights in compute; auto takes the checkpoint's where the device is fast "
      "in it.");
  t.word(
      "residency", [](auto& c) -> auto& { return c.residency; }, {"auto", "resident", "streamed"},
      "Where weights stay during a run: resident keeps a stage's blocks in memory; streamed reads each block "
      "when its turn comes, for models larger than memory; auto streams where a stage's blocks would take "
      "more "
      "than half of the memory that its rank has. The result is the same.");
  t.word(
      "format", [](auto& c) -> auto& { return c.format; }, {"compressed-tensors"},
      "Format of the quantized checkpoint.", " (the only format of this version)");
  t.integer_or_auto(
      "ranks.stages", [](auto& c) -> auto& { return c.ranks.stages; }, 1'000'000, "ranks",
      "Pipeline stages that the blocks are split over; stages x replicas is the number of ranks.");
  t.integer_or_auto(
      "ranks.replicas", [](auto& c) -> auto& { return c.ranks.replicas; }, 1'000'000, "ranks",
      "Copies of the pipeline that work on different sequences.");
  t.integer_or_auto(
      "ranks.threads", [](auto& c) -> auto& { return c.ranks.threads; }, 4096, "threads per rank",
      "Threads of a rank; auto takes one for each core that the rank may use alone, or as many as the run "
      "was "
      "started with that is continued: results may depend on their number.");
  t.word(
      "ranks.device", [](auto& c) -> auto& { return c.ranks.device; }, {"auto", "cpu", "cuda"},
      "Where a rank computes; auto takes CUDA where the build and the machine have it.");
  t.real(
      "ranks.activation_gib", [](auto& c) -> auto& { return c.ranks.activation_gib; }, 0, true, 1e6,
      "Memory of a rank for activations that the backward pass of measure reads again; blocks beyond it are "
      "recomputed from their input, with the same result.",
      "GiB");
  t.integer(
      "ranks.watchdog_s", [](auto& c) -> auto& { return c.ranks.watchdog_s; }, 0, "s",
      "Longest wait of a rank for others before it asks whether they still work, and ends the job if one "
      "does "
      "not answer; 0 waits for ever.");
  t.text(
      "scratch.directory", [](auto& c) -> auto& { return c.scratch.directory; }, false,
      "Directory of a local disk for block inputs that a measure pass with streamed weights keeps for its "
      "backward pass; empty keeps them in memory. What is written there has no name and goes with the job.");
  t.real(
      "scratch.memory_gib", [](auto& c) -> auto& { return c.scratch.memory_gib; }, 0, true, 1e6,
      "Memory of a rank for block inputs; those beyond it go to scratch.directory, if that is set.", "GiB");
  t.text(
      "calibration.tokens", [](auto& c) -> auto& { return c.calibration.tokens; }, true,
      "Token file (safetensors) of the calibration set.");
  t.integer(
      "calibration.sequences", [](auto& c) -> auto& { return c.calibration.sequences; }, 1, "sequences",
      "Calibration sequences used.");
  t.integer(
      "calibration.length", [](auto& c) -> auto& { return c.calibration.length; }, 2, "tokens",
      "Length of a calibration sequence.");
  t.integer(
      "calibration.microbatch", [](auto& c) -> auto& { return c.calibration.microbatch; }, 1, "sequences",
      "Sequences that travel together; it fixes the shapes of the sums and thereby the result's bits.");
  t.integer(
      "calibration.logical_shards", [](auto& c) -> auto& { return c.calibration.logical_shards; }, 1,
      "shards",
      "Fixed shards that sequences are dealt into, so that any number of ranks gives the same bits; at least "
      "the "
      "number of replicas.");
  t.integer(
      "calibration.seed", [](auto& c) -> auto& { return c.calibration.seed; }, 0, "",
      "Key of every random number: drawn labels, probe signs. The first sequences of the token file are "
      "taken, whatever it is.");
}

void add_sensitivity_keys(Table& t) {
  t.word(
      "sensitivity.loss", [](auto& c) -> auto& { return c.sensitivity.loss; }, {"nll", "fisher"},
      "Loss whose gradients weigh the tokens: nll takes the data's labels, fisher labels drawn from the "
      "model.",
      " (kl, the divergence from the original model, has no gradient before anything is quantized: take "
      "fisher, its Hessian, and quantization.reestimate.loss kl behind quantized blocks)");
  t.integer(
      "sensitivity.samples", [](auto& c) -> auto& { return c.sensitivity.samples; }, 1, "draws per token",
      "Label draws per token; above 1 only with loss fisher.");
  t.word(
      "sensitivity.per_sequence", [](auto& c) -> auto& { return c.sensitivity.per_sequence; },
      {"off", "probes", "exact"},
      "How the per-sequence sensitivity (equation 5) is had: not, from random probes, or exactly.");
  t.integer(
      "sensitivity.probes", [](auto& c) -> auto& { return c.sensitivity.probes; }, 1, "probes per sequence",
      "Random +-1 probes of the per-sequence estimator.");
  t.integer(
      "sensitivity.row_groups", [](auto& c) -> auto& { return c.sensitivity.row_groups; }, 1, "groups",
      "Groups of output rows with a token weight and a covariance of their own.");
  t.word(
      "sensitivity.grouping", [](auto& c) -> auto& { return c.sensitivity.grouping; },
      {"index", "head", "cluster"},
      "Which rows form a group: equal runs of them, in q, k and v whole heads, or rows whose gradients are "
      "large "
      "at the same tokens.");
  t.integer(
      "sensitivity.grouping_sequences", [](auto& c) -> auto& { return c.sensitivity.grouping_sequences; }, 1,
      "sequences",
      "Calibration sequences that grouping cluster compares rows on, rounded up to whole microbatches.");
  t.real(
      "sensitivity.clip_quantile", [](auto& c) -> auto& { return c.sensitivity.clip_quantile; }, 0, false, 1,
      "Token weights above this quantile are lowered to it; 1 lowers none.");
  t.real(
      "sensitivity.exponent", [](auto& c) -> auto& { return c.sensitivity.exponent; }, 0, true, 4,
      "Power that token weights are raised to; 0 makes all tokens equal.");
  t.real(
      "sensitivity.shrinkage", [](auto& c) -> auto& { return c.sensitivity.shrinkage; }, 0, true, 1,
      "Share of the covariance of equal tokens mixed into the weighted one; auto takes d / (d + effective "
      "tokens).",
      "", /*with_auto=*/true);
  t.flag(
      "sensitivity.covariance", [](auto& c) -> auto& { return c.sensitivity.covariance; },
      "Also stores the weighted covariance of every module of the unquantized model.");
  t.add(
      "sensitivity.gram.bits", "list of widths", "bits",
      "Widths whose effect on the loss is scored in every module while measuring, for `isobath allocate`; "
      "empty "
      "scores none. Costs one product of a weight gradient's size a linear and sequence.",
      {{"type", "array"}, {"items", bits_schema()}, {"uniqueItems", true}},
      [](RunConfig& c, const YAML::Node& node) { c.sensitivity.gram_bits = read_widths(node); },
      [](const RunConfig& c) { return ordered_json(c.sensitivity.gram_bits).dump(); });
  t.add(
      "sensitivity.gram.checkpoints", "list of paths", "",
      "Quantized versions of the model, one a width of sensitivity.gram.bits and in its order: scores "
      "what the solver made of each width instead of rounding to nearest, so that `isobath allocate` sees "
      "the errors "
      "that will be made. Empty rounds. Keeps these weights of the rank's blocks in memory while measuring.",
      {{"type", "array"}, {"items", {{"type", "string"}, {"minLength", 1}}}},
      [](RunConfig& c, const YAML::Node& node) { c.sensitivity.gram_checkpoints = read_paths(node); },
      [](const RunConfig& c) { return ordered_json(c.sensitivity.gram_checkpoints).dump(); });
  t.text(
      "sensitivity.reuse", [](auto& c) -> auto& { return c.sensitivity.reuse; }, false,
      "Finished measure/ directory of another run to use instead of measuring; empty measures.");
}

void add_quantization_keys(Table& t) {
  t.word(
      "quantization.solver", [](auto& c) -> auto& { return c.quantization.solver; },
      {"gptq", "round_to_nearest"}, "How codes are chosen.");
  t.word(
      "quantization.weighting", [](auto& c) -> auto& { return c.quantization.weighting; },
      {"sensitivity", "none"},
      "Weight of tokens in the covariance; none makes all equal, which is plain GPTQ.");
  t.add(
      "quantization.bits", "one of: 2 | 3 | 4 | 5 | 6 | 8", "bits", "Width of a code.", bits_schema(),
      [](RunConfig& c, const YAML::Node& node) { c.quantization.bits = read_bits(node); },
      [](const RunConfig& c) { return std::to_string(c.quantization.bits); });
  t.add(
      "quantization.group", "channel or integer from 16 to 4096", "input channels",
      "Input channels that share a scale; channel (or 0) gives one scale to an output row.", group_schema(),
      [](RunConfig& c, const YAML::Node& node) { c.quantization.group = read_group(node); },
      [](const RunConfig& c) { return group_text(c.quantization.group); });
  t.flag(
      "quantization.symmetric", [](auto& c) -> auto& { return c.quantization.symmetric; },
      "Grids without a zero point.");
  t.flag(
      "quantization.clip_search", [](auto& c) -> auto& { return c.quantization.clip_search; },
      "Searches the clipping range that minimises the weighted error; false takes min and max.");
  t.word(
      "quantization.act_order", [](auto& c) -> auto& { return c.quantization.act_order; }, {"none", "static"},
      "Order of columns in the solver: as they stand, or by falling diagonal with groups fixed first.");
  t.real(
      "quantization.damping", [](auto& c) -> auto& { return c.quantization.damping; }, 0, false, 1,
      "Share of the mean diagonal added to the covariance's diagonal.");
  t.integer(
      "quantization.refinement.sweeps", [](auto& c) -> auto& { return c.quantization.refinement.sweeps; }, 0,
      "sweeps",
      "Coordinate-descent sweeps over codes and scales after the column loop, at most: the first that gains "
      "nothing is the last one; 0 does none.");
  t.word(
      "quantization.asymmetric.correction",
      [](auto& c) -> auto& { return c.quantization.asymmetric.correction; }, {"none", "qep", "gptaq"},
      "Correction of the weights for what the quantized prefix did to their input; none ignores it. Costs "
      "one "
      "more forward pass.");
  t.real(
      "quantization.asymmetric.strength", [](auto& c) -> auto& { return c.quantization.asymmetric.strength; },
      0, true, 1, "Share of the correction that is made.");
  t.real(
      "quantization.asymmetric.ridge", [](auto& c) -> auto& { return c.quantization.asymmetric.ridge; }, 0,
      false, 1000, "Share of the mean diagonal added to the covariance in correction qep.");
  t.real(
      "quantization.asymmetric.residual", [](auto& c) -> auto& { return c.quantization.asymmetric.residual; },
      0, true, 1,
      "In correction qep, share of what the residual stream lacks that o_proj and down_proj make up for "
      "too.");
  t.integer(
      "quantization.tuning.epochs", [](auto& c) -> auto& { return c.quantization.tuning.epochs; }, 0,
      "passes",
      "Passes over the calibration tokens, forward and backward, that tune the scales of the quantized model "
      "by "
      "its divergence from the original.");
  t.integer(
      "quantization.tuning.steps", [](auto& c) -> auto& { return c.quantization.tuning.steps; }, 1, "steps",
      "Steps of such a pass, each on the logical shards of its turn; at most as many as there are.");
  t.real(
      "quantization.tuning.rate", [](auto& c) -> auto& { return c.quantization.tuning.rate; }, 0, false, 1,
      "Relative change of a scale in the first step, of 4 bits half of it, of 5 a quarter …; it falls "
      "linearly to 0.");
  t.word(
      "quantization.reestimate.policy", [](auto& c) -> auto& { return c.quantization.reestimate.policy; },
      {"never", "every", "drift"},
      "When token weights are measured again behind the blocks quantized so far; drift compares them on a "
      "few "
      "sequences first.");
  t.integer(
      "quantization.reestimate.blocks", [](auto& c) -> auto& { return c.quantization.reestimate.blocks; }, 1,
      "blocks", "Blocks between two measurements with policy every, two comparisons with drift.");
  t.word(
      "quantization.reestimate.loss", [](auto& c) -> auto& { return c.quantization.reestimate.loss; },
      {"same", "nll", "fisher", "kl"},
      "Loss of these measurements: that of sensitivity.loss, or another; kl is the divergence of the model "
      "as "
      "it is by then from the original, which costs one forward pass and keeps the original's last hidden "
      "states.");
  t.real(
      "quantization.reestimate.threshold",
      [](auto& c) -> auto& { return c.quantization.reestimate.threshold; }, 0, false, 1,
      "Policy drift measures again when the mean cosine of the token weights in use with those of now falls "
      "below this; 1 always does.");
  t.integer(
      "quantization.reestimate.probe_sequences",
      [](auto& c) -> auto& { return c.quantization.reestimate.probe_sequences; }, 1, "sequences",
      "Calibration sequences that policy drift compares token weights on, and that track sends through, "
      "rounded "
      "up to whole microbatches.");
  t.flag(
      "quantization.reestimate.track", [](auto& c) -> auto& { return c.quantization.reestimate.track; },
      "Whether blocks.json gets the divergence from the original, on probe_sequences, of the model whose "
      "blocks "
      "are quantized up to each one: beside that of a run with policy never it is what a policy gains.");
  t.add(
      "quantization.ignore", "list of text", "",
      "Modules left as they are: names, or re: and a regular expression matched from the start of the name.",
      {{"type", "array"}, {"items", pattern_schema()}},
      [](RunConfig& c, const YAML::Node& node) { c.quantization.ignore = read_patterns(node); },
      [](const RunConfig& c) { return ordered_json(c.quantization.ignore).dump(); });
  t.add(
      "quantization.overrides", "list of {match, bits, group}", "",
      "Bits and group of the modules whose name matches (as in ignore); a later entry wins over an earlier "
      "one.",
      {{"type", "array"},
       {"items",
        {{"type", "object"},
         {"additionalProperties", false},
         {"properties", {{"match", pattern_schema()}, {"bits", bits_schema()}, {"group", group_schema()}}},
         {"required", {"match"}},
         {"minProperties", 2}}}},
      [](RunConfig& c, const YAML::Node& node) { c.quantization.overrides = read_overrides(node); },
      [](const RunConfig& c) { return overrides_text(c.quantization.overrides); });
  t.text(
      "quantization.allocation", [](auto& c) -> auto& { return c.quantization.allocation; }, false,
      "File of widths that `isobath allocate` wrote; entries of overrides win over it. Empty: none.");
}

void add_closing_keys(Table& t) {
  t.text(
      "evaluation.tokens", [](auto& c) -> auto& { return c.evaluation.tokens; }, false,
      "Token file (safetensors) to evaluate on; empty skips the evaluation.");
  t.integer(
      "evaluation.window", [](auto& c) -> auto& { return c.evaluation.window; }, 2, "tokens",
      "Length of an evaluation window; windows do not overlap.");
  t.integer(
      "evaluation.windows", [](auto& c) -> auto& { return c.evaluation.windows; }, 1, "windows",
      "Windows evaluated, from the start of the file.");
  t.integer_or_auto(
      "checkpoint.every_blocks", [](auto& c) -> auto& { return c.checkpoint.every_blocks; }, 1'000'000,
      "blocks",
      "Quantized blocks, and steps of the tuning of scales, between two saved states; auto saves as often as "
      "2 % of the time allow, after each at most.");
  t.integer(
      "checkpoint.keep", [](auto& c) -> auto& { return c.checkpoint.keep; }, 1, "generations",
      "Saved states kept; with 2 a damaged newest one costs one interval.");
  t.text(
      "plan.cluster", [](auto& c) -> auto& { return c.plan.cluster; }, false,
      "Cluster description (YAML, isobath plan --calibrate writes one) whose predicted times and memory a "
      "run "
      "records beside the measured ones; empty records none.");
}

}  // namespace

const std::vector<Key>& key_table() {
  static const std::vector<Key> kTable = [] {
    Table table;
    add_run_keys(table);
    add_sensitivity_keys(table);
    add_quantization_keys(table);
    add_closing_keys(table);
    return std::move(table.keys_);
  }();
  return kTable;
}

}  // namespace isobath::config
