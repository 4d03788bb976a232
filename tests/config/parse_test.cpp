#include <gtest/gtest.h>

#include <isobath/config/schema.hpp>

#include "minimal.hpp"

namespace isobath::config {
namespace {

TEST(ConfigParse, RequiredKeysAloneGiveTheDefaultsOfTheStruct) {
  RunConfig expected;
  expected.model = "m";
  expected.output = "o";
  expected.calibration.tokens = "t";

  const RunConfig parsed = parse(kMinimal, {}, "run.yaml");

  EXPECT_EQ(parsed.flatten(), expected.flatten());
}

TEST(ConfigParse, EveryKeyReachesItsField) {
  const RunConfig c = parse(R"(
model: models/a
output: runs/b
compute_dtype: float32
residency: streamed
format: compressed-tensors
ranks: {stages: 2, replicas: 3, threads: 4, device: cpu, watchdog_s: 5}
scratch: {directory: s, memory_gib: 0.5}
calibration: {tokens: t, sequences: 6, length: 7, microbatch: 8, logical_shards: 9, seed: 18446744073709551615}
sensitivity: {loss: fisher, samples: 2, per_sequence: exact, probes: 3, row_groups: 4, grouping: head,
              grouping_sequences: 5, clip_quantile: 0.5, exponent: 2.5, shrinkage: 0.25, covariance: true, reuse: runs/c/measure}
quantization:
  solver: round_to_nearest
  weighting: none
  bits: 8
  group: channel
  symmetric: false
  clip_search: false
  act_order: static
  damping: 1e-3
  refinement: {sweeps: 3}
  asymmetric: {correction: gptaq, strength: 0.75, ridge: 2}
  reestimate: {policy: drift, blocks: 7, loss: kl, threshold: 0.75, probe_sequences: 9, track: true}
  ignore: []
  overrides:
    - {match: 're:.*\.down_proj$', bits: 4, group: 32}
    - {match: model.layers.0.mlp.up_proj, group: channel}
evaluation: {tokens: e, window: 10, windows: 11}
checkpoint: {every_blocks: 12, keep: 13}
)",
                            {}, "run.yaml");

  EXPECT_EQ(c.model, "models/a");
  EXPECT_EQ(c.output, "runs/b");
  EXPECT_EQ(c.compute_dtype, "float32");
  EXPECT_EQ(c.residency, "streamed");
  EXPECT_EQ(c.scratch.directory, "s");
  EXPECT_EQ(c.scratch.memory_gib, 0.5);
  EXPECT_EQ(c.ranks.stages, 2);
  EXPECT_EQ(c.ranks.replicas, 3);
  EXPECT_EQ(c.ranks.threads, 4);
  EXPECT_EQ(c.ranks.device, "cpu");
  EXPECT_EQ(c.ranks.watchdog_s, 5);
  EXPECT_EQ(c.calibration.tokens, "t");
  EXPECT_EQ(c.calibration.sequences, 6);
  EXPECT_EQ(c.calibration.length, 7);
  EXPECT_EQ(c.calibration.microbatch, 8);
  EXPECT_EQ(c.calibration.logical_shards, 9);
  EXPECT_EQ(c.calibration.seed, 18446744073709551615ULL);
  EXPECT_EQ(c.sensitivity.loss, "fisher");
  EXPECT_EQ(c.sensitivity.samples, 2);
  EXPECT_EQ(c.sensitivity.per_sequence, "exact");
  EXPECT_EQ(c.sensitivity.probes, 3);
  EXPECT_EQ(c.sensitivity.row_groups, 4);
  EXPECT_EQ(c.sensitivity.grouping, "head");
  EXPECT_EQ(c.sensitivity.grouping_sequences, 5);
  EXPECT_EQ(c.sensitivity.clip_quantile, 0.5);
  EXPECT_EQ(c.sensitivity.exponent, 2.5);
  EXPECT_EQ(c.sensitivity.shrinkage, 0.25);
  EXPECT_TRUE(c.sensitivity.covariance);
  EXPECT_EQ(c.sensitivity.reuse, "runs/c/measure");
  EXPECT_EQ(c.quantization.solver, "round_to_nearest");
  EXPECT_EQ(c.quantization.weighting, "none");
  EXPECT_EQ(c.quantization.bits, 8);
  EXPECT_EQ(c.quantization.group, 0);
  EXPECT_FALSE(c.quantization.symmetric);
  EXPECT_FALSE(c.quantization.clip_search);
  EXPECT_EQ(c.quantization.act_order, "static");
  EXPECT_EQ(c.quantization.damping, 1e-3);
  EXPECT_EQ(c.quantization.refinement.sweeps, 3);
  EXPECT_EQ(c.quantization.asymmetric.correction, "gptaq");
  EXPECT_EQ(c.quantization.asymmetric.strength, 0.75);
  EXPECT_EQ(c.quantization.asymmetric.ridge, 2);
  EXPECT_EQ(c.quantization.reestimate.policy, "drift");
  EXPECT_EQ(c.quantization.reestimate.blocks, 7);
  EXPECT_EQ(c.quantization.reestimate.loss, "kl");
  EXPECT_EQ(c.quantization.reestimate.threshold, 0.75);
  EXPECT_EQ(c.quantization.reestimate.probe_sequences, 9);
  EXPECT_TRUE(c.quantization.reestimate.track);
  EXPECT_TRUE(c.quantization.ignore.empty());
  ASSERT_EQ(c.quantization.overrides.size(), 2U);
  EXPECT_EQ(c.quantization.overrides[0].match, "re:.*\\.down_proj$");
  EXPECT_EQ(c.quantization.overrides[0].bits, 4);
  EXPECT_EQ(c.quantization.overrides[0].group, 32);
  EXPECT_EQ(c.quantization.overrides[1].bits, 0);
  EXPECT_EQ(c.quantization.overrides[1].group, 0);
  EXPECT_EQ(c.evaluation.tokens, "e");
  EXPECT_EQ(c.evaluation.window, 10);
  EXPECT_EQ(c.evaluation.windows, 11);
  EXPECT_EQ(c.checkpoint.every_blocks, 12);
  EXPECT_EQ(c.checkpoint.keep, 13);
}

TEST(ConfigParse, DivergenceAsLossOfMeasureSaysWhatToTake) {
  const std::string problem = problem_of(kMinimal + "sensitivity: {loss: kl}\n");

  EXPECT_NE(problem.find("found \"kl\""), std::string::npos) << problem;
  EXPECT_NE(problem.find("quantization.reestimate.loss kl"), std::string::npos) << problem;
}

TEST(ConfigParse, FlattenedValuesReadBackAsSettings) {
  RunConfig c = parse(kMinimal, {}, "run.yaml");
  c.model = "with: colon # and hash";
  c.output = " spaced \"quoted\"";
  c.evaluation.tokens = "true";
  c.ranks.stages = 4;
  c.quantization.group = 0;
  c.sensitivity.shrinkage = -1;
  c.quantization.damping = 0.1 + 0.2;
  c.quantization.ignore = {"lm_head", "re:.*\\.experts\\..*", "a \"b\""};
  c.quantization.overrides = {{"re:.*\\.down_proj$", 4, -1}, {"x", 0, 0}, {"y", 2, 128}};
  std::vector<std::string> settings;
  for (const auto& [key, value] : c.flatten()) settings.push_back(key + "=" + value);

  const RunConfig back = parse("", settings, "run.yaml");

  EXPECT_EQ(back.flatten(), c.flatten());
  EXPECT_EQ(back.model, c.model);
  EXPECT_EQ(back.output, c.output);
  EXPECT_EQ(back.quantization.damping, c.quantization.damping);
  EXPECT_EQ(back.quantization.ignore, c.quantization.ignore);
  EXPECT_EQ(back.sensitivity.shrinkage, -1);
  EXPECT_EQ(back.quantization.overrides[1].group, 0);
}

TEST(ConfigParse, UnknownKeyNamesFileLineAndTheNearestKey) {
  EXPECT_EQ(problem_of(kMinimal + "quantisation:\n  bits: 4\n"),
            "run.yaml:5: unknown key \"quantisation.bits\"; did you mean \"quantization.bits\"?");
  EXPECT_EQ(problem_of(kMinimal + "quantization: {bit: 4}\n"),
            "run.yaml:4: unknown key \"quantization.bit\"; did you mean \"quantization.bits\"?");
  EXPECT_EQ(problem_of(kMinimal + "damping: 4\n"),
            "run.yaml:4: unknown key \"damping\"; did you mean \"quantization.damping\"?");
  EXPECT_EQ(problem_of(kMinimal + "zebra_crossing: 4\n"),
            "run.yaml:4: unknown key \"zebra_crossing\"; `isobath check --keys` lists all keys");
}

TEST(ConfigParse, DuplicateKeysAreRejected) {
  EXPECT_EQ(problem_of(kMinimal + "model: other\n"), "run.yaml:4: duplicate key \"model\", first on line 1");
  EXPECT_EQ(problem_of(kMinimal + "ranks:\n  stages: 1\n  stages: 2\n"),
            "run.yaml:6: duplicate key \"ranks.stages\", first on line 5");
  EXPECT_EQ(problem_of(kMinimal + "ranks: {stages: 1}\nranks: {replicas: 1}\n"),
            "run.yaml:5: duplicate key \"ranks\", first on line 4");
}

TEST(ConfigParse, MissingRequiredKeysAreAllNamed) {
  const std::string problem = problem_of("quantization: {bits: 4}\n");

  EXPECT_NE(problem.find("run.yaml: missing key \"model\""), std::string::npos) << problem;
  EXPECT_NE(problem.find("run.yaml: missing key \"output\""), std::string::npos) << problem;
  EXPECT_NE(problem.find("run.yaml: missing key \"calibration.tokens\""), std::string::npos) << problem;
}

TEST(ConfigParse, SeveralProblemsAreReportedTogetherOnePerLine) {
  EXPECT_EQ(problem_of(kMinimal + "quantization:\n  bits: 7\n  group: 8\nranks: {devise: cpu}\n"),
            "run.yaml:5: quantization.bits: expected one of 2 | 3 | 4 | 5 | 6 | 8, found \"7\"\n"
            "run.yaml:6: quantization.group: expected channel or an integer from 16 to 4096, found \"8\"\n"
            "run.yaml:7: unknown key \"ranks.devise\"; did you mean \"ranks.device\"?");
}

struct BadValue {
  std::string key, value, problem;
};

class ConfigBadValue : public testing::TestWithParam<BadValue> {};

TEST_P(ConfigBadValue, SaysWhatWasExpectedAndFound) {
  const auto& [key, value, problem] = GetParam();

  EXPECT_EQ(problem_of(kMinimal, {key + "=" + value}), "--set " + key + ": " + key + ": " + problem);
}

INSTANTIATE_TEST_SUITE_P(
    EachKind, ConfigBadValue,
    testing::Values(
        BadValue{"calibration.sequences", "many", "expected integer, at least 1, found \"many\""},
        BadValue{"calibration.sequences", "1.5", "expected integer, at least 1, found \"1.5\""},
        BadValue{"calibration.sequences", "'64'", "expected integer, at least 1, found the text \"64\""},
        BadValue{"calibration.sequences", "0", "expected integer, at least 1, found 0"},
        BadValue{"calibration.sequences", "9223372036854775808",
                 "expected integer, at least 1, found \"9223372036854775808\""},
        BadValue{"calibration.sequences", "1000000001", "expected at most 1000000000, found 1000000001"},
        BadValue{"calibration.length", "1", "expected integer, at least 2, found 1"},
        BadValue{"calibration.microbatch", "[1]", "expected integer, at least 1, found a list"},
        BadValue{"calibration.seed", "-1", "expected integer, at least 0, found \"-1\""},
        BadValue{"ranks.stages", "0", "expected auto or integer from 1 to 1000000, found 0"},
        BadValue{"ranks.watchdog_s", "-1", "expected integer, at least 0, found -1"},
        BadValue{"quantization.bits", "7", "expected one of 2 | 3 | 4 | 5 | 6 | 8, found \"7\""},
        BadValue{"quantization.group", "15", "expected channel or an integer from 16 to 4096, found \"15\""},
        BadValue{"quantization.group", "4097",
                 "expected channel or an integer from 16 to 4096, found \"4097\""},
        BadValue{"quantization.symmetric", "yes", "expected true or false, found \"yes\""},
        BadValue{"quantization.symmetric", "1", "expected true or false, found \"1\""},
        BadValue{"quantization.damping", "0", "expected number above 0 and at most 1, found 0"},
        BadValue{"quantization.damping", "1.01", "expected number above 0 and at most 1, found 1.01"},
        BadValue{"quantization.damping", "nan", "expected number above 0 and at most 1, found nan"},
        BadValue{"sensitivity.shrinkage", "-1", "expected auto or number at least 0 and at most 1, found -1"},
        BadValue{"quantization.asymmetric.correction", "yes",
                 "expected one of none | qep | gptaq, found \"yes\""},
        BadValue{"sensitivity.clip_quantile", "0", "expected number above 0 and at most 1, found 0"},
        BadValue{"sensitivity.exponent", "4.5", "expected number at least 0 and at most 4, found 4.5"},
        BadValue{"sensitivity.per_sequence", "probe",
                 "expected one of off | probes | exact, found \"probe\""},
        BadValue{"residency", "disk", "expected one of auto | resident | streamed, found \"disk\""},
        BadValue{"scratch.memory_gib", "-1", "expected number at least 0 and at most 1000000, found -1"},
        BadValue{"checkpoint.every_blocks", "0", "expected auto or integer from 1 to 1000000, found 0"},
        BadValue{"format", "gptq",
                 "expected compressed-tensors (the only format of this version), found \"gptq\""},
        BadValue{"model", "", "expected text, found nothing"},
        BadValue{"model", "{a: b}", "expected text, found a map"},
        BadValue{"quantization.ignore", "lm_head",
                 "expected a list of module names such as [lm_head], found \"lm_head\""},
        BadValue{"quantization.overrides", "[{bits: 4}]",
                 "entry 1 has no \"match\": a module name, or re: and a pattern"},
        BadValue{"quantization.overrides", "[{match: x}]", "entry 1 changes nothing: give bits or group"},
        BadValue{"quantization.overrides", "[{match: x, bits: 4}, {match: x, bits: 4, groups: 32}]",
                 "entry 2: groups: expected match, bits or group, found \"groups\"; did you mean \"group\"?"},
        BadValue{"quantization.overrides", "[{match: x, bits: 4, bits: 3}]", "entry 1 names \"bits\" twice"},
        BadValue{"quantization.overrides", "[{match: x, bits: 9}]",
                 "entry 1: bits: expected one of 2 | 3 | 4 | 5 | 6 | 8, found \"9\""}));

TEST(ConfigParse, RangesIncludeTheirEnds) {
  for (const char* setting :
       {"quantization.damping=1", "sensitivity.exponent=0", "sensitivity.exponent=4",
        "sensitivity.clip_quantile=1", "quantization.group=16", "quantization.group=4096",
        "quantization.group=0", "calibration.length=2", "ranks.watchdog_s=0", "ranks.stages=auto",
        "evaluation.tokens=", "sensitivity.per_sequence=off"})
    EXPECT_EQ(problem_of(kMinimal, {setting}), "") << setting;
}

TEST(ConfigParse, SettingsOverrideTheFileAndTheLastOneWins) {
  const RunConfig c = parse(
      kMinimal + "quantization: {bits: 3}\n",
      {"quantization.bits=4", "quantization.bits=2", "quantization.reestimate={policy: every}"}, "run.yaml");

  EXPECT_EQ(c.quantization.bits, 2);
  EXPECT_EQ(c.quantization.reestimate.policy, "every");
  EXPECT_EQ(c.quantization.reestimate.blocks, 5);
}

TEST(ConfigParse, BadSettingsNameTheOption) {
  EXPECT_EQ(problem_of(kMinimal, {"quantization.bits"}),
            "--set: expected key=value, found \"quantization.bits\"");
  EXPECT_EQ(problem_of(kMinimal, {"quantization.bit=4"}),
            "--set quantization.bit: unknown key \"quantization.bit\"; did you mean \"quantization.bits\"?");
}

TEST(ConfigParse, SeveralDrawsNeedDrawnLabels) {
  EXPECT_EQ(problem_of(kMinimal + "sensitivity: {loss: nll, samples: 4}\n"),
            "run.yaml:4: sensitivity.samples: expected 1 with sensitivity.loss nll, found 4; the data have "
            "one label per "
            "token, use loss fisher to draw several");
  EXPECT_EQ(problem_of(kMinimal + "sensitivity: {loss: fisher, samples: 4}\n"), "");
}

TEST(ConfigParse, OutputOverTheModelIsRefused) {
  EXPECT_NE(
      problem_of(kMinimal, {"output=m"}).find("--set output: output: expected another directory than model"),
      std::string::npos);
}

TEST(ConfigParse, BrokenYamlNamesTheLine) {
  EXPECT_EQ(problem_of(kMinimal + "ranks: {stages: 1\nformat: x\n").find("run.yaml:"), 0U);
  EXPECT_NE(problem_of("model: a: b\n").find("not valid YAML"), std::string::npos);
  EXPECT_EQ(problem_of("model: a: b\n").find("missing key"), std::string::npos);
  EXPECT_EQ(problem_of("- a\n- b\n").find("run.yaml:1: document: expected a map of keys, found a list"), 0U);
  EXPECT_NE(problem_of(kMinimal + "---\nmodel: b\n").find("expected one YAML document, found 2"),
            std::string::npos);
}

TEST(ConfigParse, HostileYamlEndsInAnErrorNotInACrash) {
  const std::string deep = std::string(100000, '[');
  EXPECT_NE(problem_of(deep), "");
  EXPECT_NE(problem_of(kMinimal + "loop: &a {b: *a}\n"), "");
  EXPECT_NE(problem_of(kMinimal + "quantization: &q {reestimate: *q}\n"), "");
  EXPECT_NE(problem_of(kMinimal + std::string(5000, 'k') + ": 1\n"), "");
  EXPECT_NE(problem_of(kMinimal + "? [a, b]\n: 1\n"), "");
  EXPECT_NE(problem_of(std::string("model: \0x\n", 10)), "");
}

TEST(ConfigParse, AnEmptySectionChangesNothing) {
  EXPECT_EQ(problem_of(kMinimal + "quantization:\nranks: {}\n"), "");
}

}  // namespace
}  // namespace isobath::config
